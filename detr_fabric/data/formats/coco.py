"""Reads COCO JSON and evens out how tools write it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.formats.fields import Content, inside, numbers
from detr_fabric.data.formats.orientation import is_label_studio, turn_label_studio
from detr_fabric.errors import UserError

# Polygons are most of COCO's text and rarely used: cutting them out first makes reading 3 times as fast. (A polygon
# that is itself broken JSON goes unnoticed, but it is not used either.)
SEGMENTATION = re.compile(rb'"segmentation"\s*:\s*\[[-+0-9.eE, \t\r\n\[\]]*\]')


def read_coco(
    path: Path, images: Path | None = None, training: Categories | None = None, polygons: bool = False
) -> Content:
    """The content of a COCO JSON file. Annotations without a bbox get that of their polygons, back-slashes in file
    names become slashes, and if the training categories have names as ids (Pascal VOC), categories get these.

    images: the folder of images, whose orientation matters in files of Label Studio; polygons: keep them. Raises
    UserError, with the position, if the JSON is broken.
    """
    text = _read_bytes(path)
    try:
        tables = _parse(path, text if polygons else SEGMENTATION.sub(b'"segmentation":0', text))
        boxes_given = all(row.get("bbox") for row in _rows(tables, "annotations"))
        if not polygons and (not boxes_given or is_label_studio(tables)):
            tables = _parse(path, text)
    except UserError:  # say where in the file as it is
        tables = _parse(path, text)
    notes = []
    if boxes := sum(map(_take_box_of_polygons, _rows(tables, "annotations"))):
        notes.append(f"{boxes:,} annotations without a bbox get that of their polygons")
    if names := sum(map(_turn_back_slashes, _rows(tables, "images"))):
        notes.append(f"{names:,} file names have back-slashes, which are read as slashes")
    if images is not None and is_label_studio(tables):
        turned = turn_label_studio(_rows(tables, "images"), _rows(tables, "annotations"), images)
        if turned:
            notes.append(f"{turned:,} images are turned by their EXIF orientation tag, as in Label Studio")
    if training is not None and all(isinstance(id, str) for id in training.ids):
        _use_ids_of(training, tables)
    return Content(tables, notes)


def _read_bytes(path: Path) -> bytes:
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: check the path of the annotations") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): check the path of the annotations") from error
    if not text.strip():
        raise UserError(f"{path} is empty: copy or download the annotations again")
    return text


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is broken JSON at {where} ({error.msg}): correct or download it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is broken JSON ({error}): correct or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: COCO's format has images, annotations and categories")
    return content


def _rows(tables: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The entries of a list that are JSON objects; what else is wrong with it is reported later."""
    rows = tables.get(name)
    return [row for row in rows if type(row) is dict] if isinstance(rows, list) else []


def _take_box_of_polygons(row: dict[str, Any]) -> bool:
    """Gives an annotation without a bbox the smallest box around its polygons, as COCO defines it. Returns whether."""
    polygons = row.get("segmentation")
    if row.get("bbox") or not isinstance(polygons, list) or not polygons:
        return False
    if not all(isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons):
        return False
    points = numbers([value for polygon in polygons for value in polygon]).reshape(-1, 2)
    if not np.isfinite(points).all():
        return False
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    row["bbox"] = [left, top, right - left, bottom - top]
    return True


def _turn_back_slashes(row: dict[str, Any]) -> bool:
    name = row.get("file_name")
    if not isinstance(name, str) or not inside(name) or "\\" not in name:
        return False
    row["file_name"] = name.replace("\\", "/")
    return True


def _use_ids_of(training: Categories, tables: dict[str, Any]) -> None:
    """Gives categories with numbers as ids, and their annotations, the training category ids of the same names."""
    by_name = dict(zip(training.names, training.ids, strict=True))
    named = {
        row["id"]: by_name.get(row["name"], row["name"])
        for row in _rows(tables, "categories")
        if type(row.get("id")) is int and isinstance(row.get("name"), str)
    }
    for name, key in (("categories", "id"), ("annotations", "category_id")):
        for row in _rows(tables, name):
            if type(row.get(key)) is int:
                row[key] = named.get(row[key], row[key])
