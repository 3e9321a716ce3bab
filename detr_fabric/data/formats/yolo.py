"""Reads YOLO's folders of images and label files as the tables of a COCO file. An image without a label file, or with
an empty one, has no objects."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from detr_fabric.data.formats.categories import Categories, category_id
from detr_fabric.data.formats.data_yaml import YAML, Split, class_names, keypoint_values, split_images
from detr_fabric.data.formats.fields import Content
from detr_fabric.data.formats.files import IMAGE_SUFFIXES, stem_in, walk
from detr_fabric.data.formats.orientation import read_header
from detr_fabric.data.formats.yolo_labels import read_box, read_lines, refuse_possible_poses
from detr_fabric.errors import UserError

NAMES = ("classes.txt", "obj.names", "data.yaml", "data.yml", "dataset.yaml")  # files that name the classes


def read_yolo(
    path: Path, images: Path | None = None, training: Categories | None = None, split: Split | None = None
) -> Content:
    """path: data.yaml, or a folder of labels with the file of class names in it or up to two folders above.

    images: the folder of images; None, or data.yaml's folder: the images that data.yaml names for `split`. training:
    categories whose ids classes of the same name get. Raises UserError naming the file and line of what is wrong.
    """
    is_yaml = path.suffix in YAML
    if images is None and not is_yaml:
        raise UserError(f"{path}: YOLO's boxes are fractions of their images: name the images too, or data.yaml")
    names = class_names(path if is_yaml else _names_file(path))
    files = None
    if images is None or (is_yaml and split is not None and images.absolute() == path.absolute().parent):
        images, files = split_images(path, split or "train")
    if files is None:
        files = list(walk(images, IMAGE_SUFFIXES))
        labels = _labels_below(labels_folder(images) if is_yaml else path, images, files)
    else:
        labels = [labels_folder(file.parent) / file.stem for file in files]
    lines = [None if (label := _label_file(stem)) is None else read_lines(label, names) for stem in labels]
    keypoints = keypoint_values(path) if is_yaml else None
    if keypoints is None:
        refuse_possible_poses([line for objects in lines for line in objects or ()], path)

    ids = [category_id(name, training, number) for number, name in enumerate(names)]
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    kinds = Counter[str]()
    for file, objects in zip(files, lines, strict=True):
        stem, header = stem_in(images, file), read_header(file)
        # Boxes of a damaged image are never used, because reading the image fails.
        height, width = header.shown if header else (1, 1)
        size: dict[str, Any] = {"height": height, "width": width} if header else {}
        if header and header.orientation > 1:
            size["turned"] = True
        rows.append({"id": stem, "file_name": file.relative_to(images).as_posix()} | size)
        for line in objects or ():
            kind, (x, y, w, h) = read_box(line, keypoints)
            kinds[kind] += 1
            row = {"id": f"{stem}.txt line {line.number}", "image_id": stem, "category_id": ids[line.label]}
            annotations.append(row | {"bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]})
    if training is not None:
        categories = [{"id": id, "name": name} for id, name in zip(training.ids, training.names, strict=True)]
    else:
        categories = [{"id": id, "name": name} for id, name in zip(ids, names, strict=True)]
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items())) or "no objects"
    notes = [f"label files: {counts}; {lines.count(None):,} of {len(files):,} images have none"]
    if turned := sum("turned" in row for row in rows):
        notes.append(f"{turned:,} images are turned by their EXIF orientation tag, as YOLO's own tools do")
    return Content({"images": rows, "annotations": annotations, "categories": categories}, notes, converted=True)


def labels_folder(images: Path) -> Path:
    """Where YOLO has the labels of a folder of images: in "labels" instead of "images", else beside them."""
    parts = list(images.parts)
    for number in reversed(range(len(parts))):
        if parts[number] == "images":
            return Path(*parts[:number], "labels", *parts[number + 1 :])
    return images


def _names_file(labels: Path) -> Path:
    folders = (labels, *labels.absolute().parents[:2])
    for file in (folder / name for folder in folders for name in NAMES):
        if file.is_file():
            return file
    raise UserError(f"{labels}: no file names the classes; put classes.txt there, with a name a line")


def _labels_below(folder: Path, images: Path, files: list[Path]) -> list[Path]:
    """The label file of each image, without suffix. Raises UserError for labels without an image."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of labels: name it as the annotations")
    labels = [folder / stem_in(images, file) for file in files]
    known = set(labels)
    for file in walk(folder, (".txt",)):
        if file.with_suffix("") not in known and file.name not in NAMES:
            raise UserError(f"{file} has no image of its name in {images}: restore the image or remove the labels")
    return labels


def _label_file(label: Path) -> Path | None:
    """The label file with this name, if there is one."""
    files = (Path(f"{label}{suffix}") for suffix in (".txt", ".TXT"))
    return next((file for file in files if file.exists()), None)
