"""Reads YOLO's data.yaml: the classes, where the images of each split are, and whether lines are poses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml

from detr_fabric.data.formats.files import IMAGE_SUFFIXES, read_text, walk
from detr_fabric.errors import UserError

Split = Literal["train", "val"]

YAML = (".yaml", ".yml")


class NoValidation(UserError):
    """A data set has no validation split."""


class _Loader(yaml.SafeLoader):
    """Leaves every value as it is written: classes may be called on, no or 1.0."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def read_yaml(file: Path) -> dict[str, Any]:
    """The content of data.yaml; all values are strings. Raises UserError if it is broken."""
    try:
        content = yaml.load(read_text(file), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{file} is broken YAML{where}: correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is no data.yaml of YOLO: it must have `names`, `train` and `val`")
    return content


def class_names(file: Path) -> list[str]:
    """The names of classes 0, 1, ...: `names` in data.yaml, as a list or numbered, or the lines of a text file."""
    if file.suffix not in YAML:
        return [line.strip() for line in read_text(file).splitlines() if line.strip()]
    names = read_yaml(file).get("names")
    if isinstance(names, dict) and set(names) == {str(number) for number in range(len(names))}:
        names = [names[str(number)] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: `names` is no list of class names, numbered from 0; correct it")
    return names


def keypoint_values(file: Path) -> int | None:
    """How many numbers follow the box of a pose, from `kpt_shape`; 0: lines are polygons, because `task` says so; None:
    data.yaml does not say."""
    content = read_yaml(file)
    shape = content.get("kpt_shape")
    if shape is None:
        return 0 if content.get("task") in ("segment", "obb") else None
    if not (isinstance(shape, list) and len(shape) == 2 and str(shape[0]).isdigit() and shape[1] in ("2", "3")):
        raise UserError(f"{file}: kpt_shape is not [number of points, 2 or 3]; correct or remove it")
    return int(shape[0]) * int(shape[1])


def split_images(file: Path, split: Split) -> tuple[Path, list[Path] | None]:
    """The images of a split: (folder, None) for all in one folder, else (data.yaml's folder, the files that its lists
    and folders name). Raises UserError for paths that do not exist or are not below data.yaml's folder; links may lead
    elsewhere."""
    content = read_yaml(file)
    entries = content.get(split)
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list) or not all(entries) or not all(isinstance(entry, str) for entry in entries):
        message = f"{file}: `{split}` names no folder of images; add it"
        if split == "val":
            raise NoValidation(f"{message}, or take validation images by --data.val-fraction")
        raise UserError(message)
    home = file.absolute().parent
    inner = content["path"] if isinstance(content.get("path"), str) else "."
    found = []
    for entry in entries:
        # some exports write ../train/images for a folder that lies beside data.yaml
        paths = (home / inner / entry, home / entry, home / entry.removeprefix("../"))
        place = next((path for path in map(_normal, paths) if path.is_relative_to(home) and os.path.exists(path)), None)
        if place is None or not (place.is_dir() or place.suffix == ".txt"):
            raise UserError(
                f"{file}: `{split}: {entry[:200]}` is no folder beside or below it; name the folders with "
                f"--data.{split}-images FOLDER --data.{split}-annotations {file}"
            )
        found.append(place)
    if len(found) == 1 and found[0].is_dir():
        return found[0], None
    files = [walk(place, IMAGE_SUFFIXES) if place.is_dir() else _listed(place, home) for place in found]
    return home, list(dict.fromkeys(image for images in files for image in images))


def _listed(file: Path, home: Path) -> list[Path]:
    """The images that a list names, one a line, relative to the list or to data.yaml's folder `home`."""
    images = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not (name := line.strip()):
            continue
        paths = (_normal(folder / name) for folder in (file.parent, home))
        image = next((path for path in paths if path.is_relative_to(home) and os.path.isfile(path)), None)
        if image is None:
            raise UserError(f"{file} line {number}: {name[:200]} is no file beside or below {home}: correct the list")
        images.append(image)
    return images


def _normal(path: Path) -> Path:
    """An absolute path without ".." and Windows' separators."""
    return Path(os.path.normpath(str(path).replace("\\", "/")))
