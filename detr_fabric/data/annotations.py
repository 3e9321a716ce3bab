"""Annotations of a data set: read, checked as a whole, and kept in a few numpy arrays.

Plain arrays, not dictionaries: forked loader workers then share their memory instead of copying it page by page.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detr_fabric.data.categories import COCO91_CLASSES, Categories, LabelSpace
from detr_fabric.data.columns import LARGEST, Problem, Problems, check_ids, fours, inside, look_up, numbers, side, where
from detr_fabric.data.layouts import read_content
from detr_fabric.errors import UserError

REQUIRED = {
    "images": ("id", "file_name"),
    "categories": ("id", "name"),
    "annotations": ("image_id", "category_id", "bbox"),
}


@dataclass(frozen=True)
class Annotations:
    """A checked annotation file: N images in ascending id order, M objects in the file's order within each image."""

    categories: Categories
    image_ids: np.ndarray  # (N,) int64 or unicode
    file_names: np.ndarray  # (N,) unicode, relative to the image folder
    sizes: np.ndarray  # (N, 2) int64 height, width; 0 where the file does not say
    offsets: np.ndarray  # (N + 1,) int64: the objects of image i are offsets[i] : offsets[i + 1]
    boxes: np.ndarray  # (M, 4) float64 x, y, width, height in pixels, as in the file
    labels: np.ndarray  # (M,) int64
    crowd: np.ndarray  # (M,) bool
    areas: np.ndarray  # (M,) float64
    dropped: int = 0  # annotations left out: their boxes have no width or height inside the image

    def __len__(self) -> int:
        return len(self.image_ids)

    def objects(self, index: int) -> slice:
        """Where image `index` has its objects in boxes, labels, crowd and areas."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def first(self, limit: int | None, with_objects: bool) -> Annotations:
        """Only the first `limit` images; with_objects: of those that have an object besides crowds."""
        if limit is None:
            return self
        rows = np.arange(len(self))
        if with_objects:
            image_of_object = np.repeat(rows, np.diff(self.offsets))
            rows = np.unique(image_of_object[~self.crowd])
        return self.only(rows[:limit])

    def only(self, rows: np.ndarray) -> Annotations:
        """Only the images at `rows`, ascending."""
        objects = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows] or [rows])
        return Annotations(
            categories=self.categories,
            image_ids=self.image_ids[rows],
            file_names=self.file_names[rows],
            sizes=self.sizes[rows],
            offsets=np.concatenate([[0], np.cumsum(np.diff(self.offsets)[rows])]),
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            crowd=self.crowd[objects],
            areas=self.areas[objects],
            dropped=self.dropped,
        )


def read_annotations(
    path: Path,
    categories: Categories | None = None,
    label_space: LabelSpace = "contiguous",
    images: Path | None = None,
) -> Annotations:
    """Reads and checks a COCO annotation file, or one of the other layouts.

    categories: those of the training annotations, which the file must then use; None: the file's own, numbered as
    label_space says. images: the folder of images, which YOLO's layout needs. Raises UserError with the first problem,
    its first ids and how many they are.
    """
    annotations, problems = inspect_annotations(path, categories, label_space, images)
    if annotations is None:
        more = (
            f"; {len(problems) - 1} other kinds of fault: python -m detr_fabric.check lists all" if problems[1:] else ""
        )
        raise UserError(f"{path}: {problems[0].message}{more}")
    return annotations


def inspect_annotations(
    path: Path,
    categories: Categories | None = None,
    label_space: LabelSpace = "contiguous",
    images: Path | None = None,
) -> tuple[Annotations | None, list[Problem]]:
    """As read_annotations, but returns all problems; annotations are None if and only if there is one.

    Raises UserError where nothing can be checked: the file cannot be read, or is of no known layout.
    """
    was_enabled = gc.isenabled()
    gc.disable()  # a million small dictionaries set the collector off again and again: half of the reading time
    try:
        return inspect_content(read_content(path, images, categories), categories, label_space)
    finally:
        if was_enabled:
            gc.enable()


class _Images(NamedTuple):
    """The images in the file's order."""

    ids: list[Any]
    names: list[Any]
    sizes: np.ndarray  # (n, 2) int64 height, width
    ids_usable: bool


class _Objects(NamedTuple):
    """The annotations in the file's order."""

    ids: list[Any]  # for messages
    image_ids: list[Any]
    category_ids: list[Any]
    boxes: np.ndarray  # (m, 4) float64
    crowd: np.ndarray  # (m,) bool
    areas: np.ndarray  # (m,) float64


def inspect_content(
    content: dict[str, Any], training: Categories | None, label_space: LabelSpace
) -> tuple[Annotations | None, list[Problem]]:
    """inspect_annotations of what a file holds."""
    problems = Problems()
    for table, keys in REQUIRED.items():
        _check_table(content, table, keys, problems)
    if problems:
        return None, problems

    categories = _categories(content["categories"], training, label_space, problems)
    images = _images(content["images"], problems)
    objects = _objects(content["annotations"], problems)
    if categories is not None:
        labels = look_up(objects.category_ids, categories.labels)
        unknown = where(labels < 0, objects.ids)
        known = "the categories" if training is None else "the categories of the training annotations"
        problems.report("unknown category", unknown, f"annotations name a category that is not among {known}", "add it")
    if images.ids_usable:
        order = sorted(range(len(images.ids)), key=images.ids.__getitem__)
        place = {images.ids[row]: number for number, row in enumerate(order)}
        image = look_up(objects.image_ids, place)  # (m,) index of each object's image
        unknown = where(image < 0, objects.ids)
        problems.report("unknown image", unknown, "annotations name an image that is not among the images", "add it")
    if problems:
        return None, problems

    assert categories is not None
    sizes = images.sizes[order]
    kept = np.flatnonzero(has_area(objects.boxes, sizes[image]))
    kept = kept[np.argsort(image[kept], kind="stable")]
    annotations = Annotations(
        categories=categories,
        image_ids=np.array([images.ids[row] for row in order]),
        file_names=np.array([images.names[row] for row in order]),
        sizes=sizes,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(image[kept], minlength=len(sizes)))]),
        boxes=objects.boxes[kept],
        labels=labels[kept],
        crowd=objects.crowd[kept],
        areas=objects.areas[kept],
        dropped=len(objects.ids) - len(kept),
    )
    return annotations, []


def _check_table(content: dict[str, Any], table: str, keys: tuple[str, ...], problems: Problems) -> None:
    rows = content.get(table)
    if not isinstance(rows, list):
        problems.append(Problem("missing key", (), f"it has no list {table!r}: COCO's format needs one"))
        return
    if not rows and table != "annotations":
        problems.append(Problem(f"no {table}", (), f"its list {table!r} is empty: add at least one entry"))
    entries = [row for row in rows if type(row) is dict]
    if len(entries) < len(rows):
        wrong = [number for number, row in enumerate(rows) if type(row) is not dict]
        problems.report("entry", wrong, f"entries of {table} (counted from 0) are no JSON objects", "correct them")
    for key in keys:
        missing = [number for number, row in enumerate(rows) if type(row) is dict and key not in row]
        problems.report("missing key", missing, f"entries of {table} (counted from 0) have no {key!r}", "add it")


def _categories(
    rows: list[dict[str, Any]], training: Categories | None, label_space: LabelSpace, problems: Problems
) -> Categories | None:
    """The training categories, or the file's own; None if they are not usable."""
    ids = [row["id"] for row in rows]
    names = [row["name"] for row in rows]
    unnamed = [id for id, name in zip(ids, names, strict=True) if not isinstance(name, str)]
    problems.report("category name", unnamed, "categories have a name that is no string", "correct it")
    if not check_ids("category", ids, problems) or unnamed:
        return training
    if training is not None:
        expected = dict(zip(training.ids, training.names, strict=True))
        other = [id for id, name in zip(ids, names, strict=True) if expected.get(id, name) != name]
        what = "categories have another name than in the training annotations"
        problems.report("category name", other, what, "use the same ids and names in both files")
        return training
    if label_space == "coco91":
        outside = [id for id in ids if not (isinstance(id, int) and 1 <= id < COCO91_CLASSES)]
        what = f"categories have an id outside COCO's 1 to {COCO91_CLASSES - 1}"
        problems.report("coco91", outside, what, "use --data.label-space contiguous")
        if outside:
            return None
    by_id = sorted(zip(ids, names, strict=True))
    return Categories(tuple(id for id, _ in by_id), tuple(name for _, name in by_id), label_space)


def _images(rows: list[dict[str, Any]], problems: Problems) -> _Images:
    ids = [row["id"] for row in rows]
    usable = check_ids("image", ids, problems)
    names = [row["file_name"] for row in rows]
    outside = [id for id, name in zip(ids, names, strict=True) if not inside(name)]
    what = "images have a file_name that is no path inside the image folder"
    problems.report("file name", outside, what, "give a relative name without '..'")
    sizes = np.array([(side(row.get("height")), side(row.get("width"))) for row in rows], dtype=np.int64)
    wrong = where(np.any(sizes < 0, axis=1), ids)
    what = "images have a width or height that is no positive whole number"
    problems.report("image size", wrong, what, "correct or remove it")
    return _Images(ids, names, sizes, usable)


def _objects(rows: list[dict[str, Any]], problems: Problems) -> _Objects:
    ids = [row.get("id", f"number {number}") for number, row in enumerate(rows)]
    check_ids("annotation", [row["id"] for row in rows if "id" in row], problems)

    boxes = fours([row["bbox"] for row in rows])
    wrong = where(~(np.abs(boxes) < LARGEST).all(1), ids)
    problems.report("box", wrong, "annotations have a bbox that is not four finite numbers", "correct or remove them")

    crowd = [0 if row.get("iscrowd") is None else row["iscrowd"] for row in rows]
    odd = [id for id, flag in zip(ids, crowd, strict=True) if flag not in (0, 1)]
    problems.report("iscrowd", odd, "annotations have an iscrowd other than 0 or 1", "correct it")

    areas = [row.get("area") for row in rows]
    given = numbers([0 if area is None else area for area in areas])
    wrong = where(~(np.abs(given) < LARGEST**2), ids)
    problems.report("area", wrong, "annotations have an area that is no finite number", "correct or remove it")
    missing = np.array([area is None for area in areas], dtype=bool)
    with np.errstate(all="ignore"):  # of boxes just refused
        box_areas = boxes[:, 2] * boxes[:, 3]
    return _Objects(
        ids=ids,
        image_ids=[row["image_id"] for row in rows],
        category_ids=[row["category_id"] for row in rows],
        boxes=boxes,
        crowd=np.array([flag == 1 for flag in crowd], dtype=bool),
        areas=np.where(missing, box_areas, given),
    )


def clip_boxes(xywh: np.ndarray, height: np.ndarray | int, width: np.ndarray | int) -> np.ndarray:
    """(M, 4) x, y, width, height → (M, 4) float32 xyxy inside the image, in the original's float32 arithmetic."""
    boxes = xywh.astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, np.asarray(width, dtype=np.float32).reshape(-1, 1))
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, np.asarray(height, dtype=np.float32).reshape(-1, 1))
    return boxes


def has_area(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(M,) whether boxes keep a width and a height inside images of (M, 2) height, width; 0: unknown."""
    limits = np.where(sizes > 0, sizes, LARGEST)
    clipped = clip_boxes(boxes, limits[:, 0], limits[:, 1])
    return np.all(clipped[:, 2:] > clipped[:, :2], axis=1)


def leaves_image(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(M,) whether boxes, as for has_area, lose more than a pixel when they are clipped; less is rounding."""
    limits = np.where(sizes > 0, sizes, LARGEST)[:, ::-1]
    return ((boxes[:, :2] < -1) | (boxes[:, :2] + boxes[:, 2:] > limits + 1)).any(1)
