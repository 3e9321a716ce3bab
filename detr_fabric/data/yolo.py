"""YOLO's folders of images and of text files → what a COCO annotation file would hold.

A line is `class x y width height`, the box by its centre, in parts of the image's width and height; or `class x1 y1 x2
y2 x3 y3 …`, a polygon, whose box is taken. An image without a text file, or with an empty one, has no objects.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from detr_fabric.data.categories import Categories, category_id
from detr_fabric.errors import UserError

YAML = (".yaml", ".yml")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
NAMES = ("classes.txt", "obj.names", "data.yaml", "data.yml", "dataset.yaml")  # files that name the classes
SLACK = 1e-3  # by which a rounded part of an image may leave [0, 1]


def read_yolo(path: Path, images: Path | None, training: Categories | None = None) -> dict[str, Any]:
    """path: data.yaml, or a folder of labels with the file of class names in it or up to two folders above.

    images: the folder of images; None: the one that data.yaml has for training. The labels of data.yaml's images are
    where the path has "labels" instead of "images", else beside them. training: categories whose ids classes of the
    same name get. Raises UserError naming the file and line of what is wrong.
    """
    if images is None and path.suffix in YAML:
        images = images_folder(path, "train")
    if images is None:
        raise UserError(
            f"{path}: YOLO's boxes are parts of their images: name the images too, or all by --root data.yaml"
        )
    names = class_names(path if path.suffix in YAML else _names_file(path))
    labels = labels_folder(images) if path.suffix in YAML else path
    if not labels.is_dir():
        raise UserError(f"{labels} is no folder of labels: name it as the annotations")
    pictures = sorted(file for file in images.rglob("[!.]*") if file.suffix.lower() in PICTURES)
    known = {file.relative_to(images).with_suffix("") for file in pictures}
    for file in sorted(labels.rglob("[!.]*.txt")):
        if file.relative_to(labels).with_suffix("") not in known and file.name not in NAMES:
            raise UserError(f"{file} has no image of its name in {images}: restore the image or remove the labels")
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ids = [category_id(name, training, number) for number, name in enumerate(names)]
    for file in pictures:
        stem = file.relative_to(images).with_suffix("")
        image = {"id": stem.as_posix(), "file_name": file.relative_to(images).as_posix()}
        size = _size(file)
        rows.append(image if size is None else image | {"width": size[0], "height": size[1]})
        width, height = size or (1, 1)  # whoever reads a damaged image says so then; its boxes are never used
        for number, (label, (x, y, w, h)) in _lines(labels / stem.with_suffix(".txt"), names):
            row = {"id": f"{stem.as_posix()}.txt line {number}", "image_id": image["id"], "category_id": ids[label]}
            annotations.append(row | {"bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]})
    if training is not None:
        categories = [{"id": id, "name": name} for id, name in zip(training.ids, training.names, strict=True)]
    else:
        categories = [{"id": id, "name": name} for id, name in zip(ids, names, strict=True)]
    return {"images": rows, "annotations": annotations, "categories": categories}


def class_names(file: Path) -> list[str]:
    """The names of the classes 0, 1, …: `names` of data.yaml, a list or numbered; or the lines of a text file."""
    if file.suffix not in YAML:
        return [line.strip() for line in _text(file).splitlines() if line.strip()]
    names = read_yaml(file).get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int | float) for name in names):
        raise UserError(f"{file}: `names` is no list of class names, numbered from 0; correct it")
    return [str(name) for name in names]


def read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(_text(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{file} is broken YAML{where}: correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is no data.yaml of YOLO: it must have `names`, `train` and `val`")
    return content


def images_folder(file: Path, part: str) -> Path:
    """Where data.yaml says that the images of "train" or "val" are; only folders inside its own are followed."""
    content = read_yaml(file)
    given = content.get(part)
    if not isinstance(given, str):
        raise UserError(
            f"{file}: `{part}` names no folder of images; add it, or take validation images by --data.val-fraction"
            if part == "val"
            else f"{file}: `{part}` names no folder of images; add it"
        )
    home = file.parent.resolve()
    path = content.get("path") if isinstance(content.get("path"), str) else "."
    # some exports write ../train/images for a folder that lies beside data.yaml
    for folder in (home / str(path) / given, home / given, home / given.removeprefix("../")):
        if os.path.isdir(folder) and folder.resolve().is_relative_to(home):
            return folder
    raise UserError(
        f"{file}: `{part}: {given[:200]}` is no folder beside or below it; name the folders with "
        f"--data.{part}-images FOLDER --data.{part}-annotations {file}"
    )


def labels_folder(images: Path) -> Path:
    """Where YOLO has the labels of a folder of images."""
    parts = list(images.parts)
    for place in reversed(range(len(parts))):
        if parts[place] == "images":
            return Path(*parts[:place], "labels", *parts[place + 1 :])
    return images


def _names_file(labels: Path) -> Path:
    folders = (labels, *labels.resolve().parents[:2])
    for file in (folder / name for folder in folders for name in NAMES):
        if file.is_file():
            return file
    raise UserError(f"{labels}: no file names the classes; put classes.txt there, with a name a line")


def _lines(file: Path, names: list[str]) -> list[tuple[int, tuple[int, list[float]]]]:
    """Line numbers, classes, and centre x, y, width, height in parts of the image."""
    if not file.exists():
        return []
    found = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not (fields := line.split()):
            continue
        where = f"{file} line {number}"
        try:
            label, values = int(fields[0]), [float(field) for field in fields[1:]]
        except ValueError:
            raise UserError(f"{where} is no class number and fractions: correct it") from None
        if not 0 <= label < len(names):
            raise UserError(
                f"{where}: class {label} is not among the {len(names)} names, which count from 0: correct it"
            )
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise UserError(f"{where} has {len(fields)} fields where `class x y width height` has 5: correct it")
        if not all(-SLACK <= value <= 1 + SLACK for value in values):
            raise UserError(f"{where}: a box has fractions of the image, in [0, 1], not pixels: correct it")
        if len(values) > 4:
            xs, ys = values[0::2], values[1::2]
            left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
            values = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        found.append((number, (label, values)))
    return found


def _size(file: Path) -> tuple[int, int] | None:
    """Width and height, from the header alone; None where it can't be read."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.size
    except Exception:  # on damaged files Pillow's plugins raise nearly anything
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): check the file") from error
