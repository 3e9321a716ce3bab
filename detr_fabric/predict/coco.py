"""Ids of detections that COCO's tools accept: whole numbers, or those of a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.formats.detect import read_content
from detr_fabric.data.formats.other_classes import labels_by_name
from detr_fabric.errors import UserError
from detr_fabric.predict.paths import ImageFile


class Ids(NamedTuple):
    """What detections go by."""

    files: list[ImageFile]  # those to predict
    images: list[int]  # the image id of each file
    categories: dict[int, int]  # label → category id; detections of other labels are left out


def own_ids(files: list[ImageFile], categories: Categories) -> Ids:
    """Ids where no annotations give them.

    Images: the numbers that all files are called by, as COCO's are (000000000139.jpg: 139), else 1, 2, … in their
    order. Categories: see category_ids_of.
    """
    stems = [Path(file.name).stem for file in files]
    called = all(stem.isascii() and stem.isdigit() for stem in stems) and len({*map(int, stems)}) == len(stems)
    images = [int(stem) for stem in stems] if called else list(range(1, len(files) + 1))
    return Ids(files, images, category_ids_of(categories))


def category_ids_of(categories: Categories) -> dict[int, int]:
    """Label → category id as COCO's tools want it: the training data's, where these are numbers, else 1, 2, … in their
    order, as `check --fix` does."""
    ids = {label: categories.id(label) for label in range(categories.num_classes)}
    return {label: id if isinstance(id, int) else label + 1 for label, id in ids.items()}


def ids_of_file(path: Path, files: Sequence[ImageFile], categories: Categories, aliases: Sequence[str] = ()) -> Ids:
    """The ids that a COCO JSON file has for images, by file name, and for classes, by name; images that it does not
    have are left out.

    Raises UserError for a file that has none of the images, none of the classes, or ids that are no whole numbers, and
    where two files are the same of its images.
    """
    tables = read_content(path).tables
    rows = {name: tables.get(name) for name in ("images", "categories")}
    for name, entries in rows.items():
        whole = isinstance(entries, list) and all(type(row) is dict and type(row.get("id")) is int for row in entries)
        if not whole:
            raise UserError(
                f"--annotations {path}: its {name} have no ids that are whole numbers, as COCO's tools want them: give "
                f"a COCO JSON file; python -m detr_fabric.check {path} --fix OUT.json makes one"
            )
    places = image_places([str(row.get("file_name")) for row in rows["images"] or ()], files)
    kept = [(file, place) for file, place in zip(files, places, strict=True) if place is not None]
    if not kept:
        raise UserError(f"--annotations {path}: has no image called {files[0].name}, nor any other of the files")
    taken: dict[int, ImageFile] = {}
    for file, place in kept:
        if place in taken:
            raise UserError(
                f"--annotations {path}: {taken[place].path} and {file.path} have the name of one of its images: "
                "predict them one after the other"
            )
        taken[place] = file
    named = [(row["id"], str(row.get("name"))) for row in rows["categories"] or ()]
    labels = labels_by_name(named, categories, path, aliases)
    if all(label < 0 for label in labels):
        raise UserError(f"--annotations {path}: the model knows none of its classes; use the file of its own classes")
    by_label = {label: id for label, (id, _) in reversed([*zip(labels, named, strict=True)]) if label >= 0}
    images = [rows["images"][place]["id"] for _, place in kept] if rows["images"] else []
    return Ids([file for file, _ in kept], images, by_label)


def image_places(names: Sequence[str], files: Sequence[ImageFile]) -> list[int | None]:
    """The place of each file among annotated file names: that whose name, with its folders, ends the file's path (the
    longest of several); else the only one whose name ends in the file's. None where there is none."""
    by_base: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
    for place, name in enumerate(names):
        parts = PurePosixPath(name.replace("\\", "/")).parts
        by_base.setdefault(parts[-1] if parts else "", []).append((place, parts))
    found: list[int | None] = []
    for file in files:
        path, own = PurePosixPath(os.path.abspath(file.path)).parts, PurePosixPath(file.name).parts
        alike = by_base.get(own[-1], [])
        inside = [(len(parts), place) for place, parts in alike if path[-len(parts) :] == parts]
        around = [place for place, parts in alike if parts[-len(own) :] == own]
        found.append(max(inside)[1] if inside else around[0] if len(around) == 1 else None)
    return found
