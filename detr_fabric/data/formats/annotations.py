"""Reads the annotations of a data set, checks them, and keeps them in a few numpy arrays.

Arrays instead of dictionaries, because forked loader workers share their memory; counting references to dictionaries
would copy it page by page.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detr_fabric.data.formats.categories import COCO91_CLASSES, Categories, LabelSpace
from detr_fabric.data.formats.data_yaml import Split
from detr_fabric.data.formats.detect import read_content
from detr_fabric.data.formats.fields import (
    LARGEST,
    LARGEST_AREA,
    Content,
    Problem,
    Problems,
    check_ids,
    fours,
    inside,
    is_name,
    look_up,
    numbers,
    side,
    where,
)
from detr_fabric.data.formats.orientation import read_header
from detr_fabric.errors import UserError

REQUIRED = {
    "images": ("id", "file_name"),
    "categories": ("id", "name"),
    "annotations": ("image_id", "category_id", "bbox"),
}


@dataclass(frozen=True)
class Annotations:
    """Checked annotations: N images in ascending order of ids, M objects, those of an image in the file's order."""

    categories: Categories
    image_ids: np.ndarray  # (N,) int64 or unicode
    file_names: np.ndarray  # (N,) unicode, relative to the image folder
    sizes: np.ndarray  # (N, 2) int64 height, width; 0 if the file does not give it
    turned: np.ndarray  # (N,) bool: boxes and size are of the view that an EXIF orientation tag asks for
    offsets: np.ndarray  # (N + 1,) int64: the objects of image i are offsets[i] : offsets[i + 1]
    boxes: np.ndarray  # (M, 4) float64 x, y, width, height in pixels, as in the file
    labels: np.ndarray  # (M,) int64
    crowd: np.ndarray  # (M,) bool
    areas: np.ndarray  # (M,) float64
    dropped: int = 0  # annotations without width or height inside the image, which are left out
    notes: tuple[str, ...] = ()  # what the user should know about how the file was read

    def __len__(self) -> int:
        return len(self.image_ids)

    def objects(self, index: int) -> slice:
        """Which rows of boxes, labels, crowd and areas belong to image `index`."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def first(self, limit: int | None, with_objects: bool) -> Annotations:
        """Only the first `limit` images (None: all); with_objects: the first that have an object that is no crowd."""
        if limit is None:
            return self
        rows = np.arange(len(self))
        if with_objects:
            image_of_object = np.repeat(rows, np.diff(self.offsets))
            rows = np.unique(image_of_object[~self.crowd])
        return self.only(rows[:limit])

    def only(self, rows: np.ndarray) -> Annotations:
        """Only the images with these indices, which ascend."""
        objects = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows] or [rows])
        return replace(
            self,
            image_ids=self.image_ids[rows],
            file_names=self.file_names[rows],
            sizes=self.sizes[rows],
            turned=self.turned[rows],
            offsets=np.concatenate([[0], np.cumsum(np.diff(self.offsets)[rows])]),
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            crowd=self.crowd[objects],
            areas=self.areas[objects],
        )

    def require_objects(self, source: Path) -> Annotations:
        """The annotations themselves. Raises UserError, with the reason, if there is no object to train on."""
        if not self.crowd.all():
            return self
        counts = ((len(self.crowd), "crowds"), (self.dropped, "boxes without area"))
        found = [f"{count:,} {what}" for count, what in counts if count] or ["no annotations"]
        raise UserError(
            f"{source}: no object to train on, only {', '.join(found)} for {len(self):,} images"
            f"{''.join(f'; {note}' for note in self.notes)}: check the labels"
        )


def read_annotations(
    path: Path,
    categories: Categories | None = None,
    label_space: LabelSpace = "contiguous",
    images: Path | None = None,
    split: Split | None = None,
) -> Annotations:
    """Reads and checks a COCO annotation file, or annotations in another format.

    categories: those of the training annotations, which the file must use; None: the file's own, numbered as
    label_space says. images: the folder of images, which YOLO needs and VOC uses; split: which images of a data.yaml.
    Raises UserError with the first problem, its first ids and their number.
    """
    annotations, problems = inspect_annotations(path, categories, label_space, images, split)
    if annotations is None:
        more = f"; {len(problems) - 1} other problems: python -m detr_fabric.check lists all" if problems[1:] else ""
        raise UserError(f"{path}: {problems[0].message}{more}")
    return annotations


def inspect_annotations(
    path: Path,
    categories: Categories | None = None,
    label_space: LabelSpace = "contiguous",
    images: Path | None = None,
    split: Split | None = None,
) -> tuple[Annotations | None, list[Problem]]:
    """Like read_annotations, but returns all problems. Annotations are None if and only if there are any.

    Raises UserError if nothing can be checked: the file cannot be read, or its format is unknown.
    """
    was_enabled = gc.isenabled()
    gc.disable()  # a million small dictionaries trigger the collector again and again, for half of the reading time
    try:
        return inspect_content(read_content(path, images, categories, split), categories, label_space, images)
    finally:
        if was_enabled:
            gc.enable()


class _Images(NamedTuple):
    """The images in the file's order."""

    ids: list[Any]
    names: list[Any]
    sizes: np.ndarray  # (n, 2) int64 height, width
    turned: np.ndarray  # (n,) bool
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
    content: Content, training: Categories | None, label_space: LabelSpace, folder: Path | None = None
) -> tuple[Annotations | None, list[Problem]]:
    """Like inspect_annotations, for content that has been read. folder: of the images, for sizes that it lacks."""
    problems, tables = Problems(), content.tables
    for table, keys in REQUIRED.items():
        _check_table(tables, table, keys, problems)
    if problems:
        return None, problems

    used = [row["category_id"] for row in tables["annotations"]]
    groups = [] if training is not None else _empty_groups(tables["categories"], used)
    rows = [row for row in tables["categories"] if row not in groups]
    categories = _categories(rows, training, label_space, problems)
    images = _images(tables["images"], problems, folder)
    objects = _objects(tables["annotations"], problems)
    if categories is not None:
        labels = look_up(objects.category_ids, categories.labels)
        unknown = where(labels < 0, objects.ids)
        known = "the categories" if training is None else "the categories of the training annotations"
        problems.report("unknown category", unknown, f"annotations name a category that is not among {known}", "add it")
    if images.ids_usable:
        order = sorted(range(len(images.ids)), key=images.ids.__getitem__)
        position = {images.ids[row]: number for number, row in enumerate(order)}
        image = look_up(objects.image_ids, position)  # (m,) index of each object's image
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
        turned=images.turned[order],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(image[kept], minlength=len(sizes)))]),
        boxes=objects.boxes[kept],
        labels=labels[kept],
        crowd=objects.crowd[kept],
        areas=objects.areas[kept],
        dropped=len(objects.ids) - len(kept),
        notes=(
            *content.notes,
            *(
                f"category {row['id']!a} is left out: another one named {row['name']!a} has the objects"
                for row in groups
            ),
        ),
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
    """The training categories, or the file's own; None if these are not usable."""
    ids = [row["id"] for row in rows]
    names = [row["name"] for row in rows]
    unnamed = [id for id, name in zip(ids, names, strict=True) if not is_name(name)]
    problems.report("category name", unnamed, "categories have a name that is no text", "correct it")
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


def _empty_groups(rows: list[dict[str, Any]], used: list[Any]) -> list[dict[str, Any]]:
    """Categories without annotations, but with the name of one that has some: Roboflow's super-categories."""
    usable = [row for row in rows if type(row["id"]) in (int, str) and isinstance(row["name"], str)]
    ids = {id for id in used if type(id) in (int, str)}
    names = {row["name"] for row in usable if row["id"] in ids}
    return [row for row in usable if row["id"] not in ids and row["name"] in names]


def _images(rows: list[dict[str, Any]], problems: Problems, folder: Path | None) -> _Images:
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
    turned = np.array([row.get("turned") is True for row in rows], dtype=bool)
    if folder is not None and not outside:
        for row in np.flatnonzero(np.any(sizes == 0, axis=1)).tolist():
            header = read_header(folder / names[row])
            found = (0, 0) if header is None else header.shown if turned[row] else header[:2]
            sizes[row] = np.where(sizes[row] == 0, found, sizes[row])
    return _Images(ids, names, sizes, turned, usable)


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
    wrong = where(~((given >= 0) & (given <= LARGEST_AREA)), ids)
    what = f"annotations have an area that is no number from 0 to {LARGEST_AREA:.0e}"
    problems.report("area", wrong, what, "correct or remove it")
    missing = np.array([area is None for area in areas], dtype=bool)
    with np.errstate(all="ignore"):  # the boxes refused above
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
    """(M, 4) x, y, width, height → (M, 4) float32 xyxy inside the image, rounded as in the original implementation."""
    boxes = xywh.astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, np.asarray(width, dtype=np.float32).reshape(-1, 1))
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, np.asarray(height, dtype=np.float32).reshape(-1, 1))
    return boxes


def clip_leaving(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(M, 4) boxes x, y, width, height, clipped if that makes them smaller by more than 1 %, else as in the file.
    sizes: as for has_area."""
    limits = np.where(sizes > 0, sizes, LARGEST)
    corners = clip_boxes(boxes, limits[:, 0], limits[:, 1])
    clipped = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    leave = clipped[:, 2:].prod(1) < 0.99 * boxes[:, 2:].prod(1)
    return np.where(leave[:, None], clipped, boxes)


def has_area(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(M,) whether boxes have a width and a height inside their image. sizes: (M, 2) height, width; 0: unknown."""
    limits = np.where(sizes > 0, sizes, LARGEST)
    clipped = clip_boxes(boxes, limits[:, 0], limits[:, 1])
    result: np.ndarray = np.all(clipped[:, 2:] > clipped[:, :2], axis=1)
    return result


def leaves_image(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(M,) whether clipping takes more than a pixel from boxes; less is rounding. sizes: as for has_area."""
    limits = np.where(sizes > 0, sizes, LARGEST)[:, ::-1]
    result: np.ndarray = np.any((boxes[:, :2] < -1) | (boxes[:, :2] + boxes[:, 2:] > limits + 1), axis=1)
    return result
