"""Reads YOLO's label files. A line is one of

class x y width height                   a box by its centre, in fractions of the image's width and height
class x1 y1 x2 y2 x3 y3 ...              a polygon
class x y width height x1 y1 (v1) ...    a pose, if data.yaml has kpt_shape: [points, 2 or 3]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from detr_fabric.data.formats.files import read_text
from detr_fabric.errors import UserError

SLACK = 1e-3  # rounded fractions may leave [0, 1] by this much


class Line(NamedTuple):
    """An object in a label file."""

    where: str  # for messages
    number: int
    label: int
    values: list[float]  # what follows the class
    last: str  # the last of them, as written


def read_lines(file: Path, names: Sequence[str]) -> list[Line]:
    """The lines of a label file. Raises UserError for what is no number, and for classes without a name."""
    lines = []
    for number, text in enumerate(read_text(file).splitlines(), 1):
        if not (fields := text.split()):
            continue
        where = f"{file} line {number}"
        try:
            label, values = float(fields[0]), [float(field) for field in fields[1:]]
        except ValueError:
            raise UserError(f"{where} is no class number and fractions: correct it") from None
        if label not in range(len(names)):
            raise UserError(
                f"{where}: class {fields[0]} is not among the {len(names)} names, which count from 0: correct it"
            )
        lines.append(Line(where, number, int(label), values, fields[-1]))
    return lines


def read_box(line: Line, keypoints: int | None) -> tuple[str, tuple[float, float, float, float]]:
    """What a line is ("boxes", "polygons" or "poses"), and its box: centre x, y, width, height in fractions.

    keypoints: how many numbers follow the box of a pose; 0 or None: there are no poses. Raises UserError for a line
    that is none of these, or may be several.
    """
    values, fields = line.values, len(line.values) + 1
    if keypoints and fields not in (5, 5 + keypoints):
        raise UserError(
            f"{line.where} has {fields} fields where kpt_shape in data.yaml makes {5 + keypoints}: correct either"
        )
    if fields == 6 or (fields == 7 and line.last.isdigit() and _is_inside(values[:4])):
        raise UserError(
            f"{line.where} has {fields} fields, as predictions with a confidence or a track id have, where "
            "`class x y width height` has 5: remove the others"
        )
    if fields < 5 or (fields % 2 == 0 and not keypoints):
        raise UserError(
            f"{line.where} has {fields} fields where `class x y width height` has 5 and a polygon an odd number: "
            "correct it, or add kpt_shape to data.yaml if it is a pose"
        )
    kind = "boxes" if fields == 5 else "poses" if keypoints else "polygons"
    shape = values if kind == "polygons" else values[:4]
    if not all(-SLACK <= value <= 1 + SLACK for value in shape):
        raise UserError(f"{line.where}: a box has fractions of the image, in [0, 1], not pixels or percent: correct it")
    if kind == "polygons":
        xs, ys = values[0::2], values[1::2]
        left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
        return kind, ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    x, y, width, height = shape
    return kind, (x, y, width, height)


def refuse_possible_poses(lines: Sequence[Line], source: Path) -> None:
    """Raises UserError if all lines that may be polygons may also be poses: a box in the image with points in it."""
    long = [line.values for line in lines if len(line.values) >= 6 and len(line.values) % 2 == 0]
    if (
        long
        and len(set(map(len, long))) == 1
        and any(all(_may_be_pose(values, size) for values in long) for size in (2, 3))
    ):
        raise UserError(
            f"{source}: the {len(long)} lines of {len(long[0]) + 1} fields may be polygons, or boxes with keypoints: "
            "tell which in data.yaml, by `task: segment` or by `kpt_shape: [number of points, 2 or 3]`"
        )


def _may_be_pose(values: list[float], size: int) -> bool:
    """size: numbers of a keypoint: x, y and perhaps its visibility 0, 1 or 2. Keypoints at (0, 0) are not there."""
    x, y, width, height = values[:4]
    points = [values[start : start + size] for start in range(4, len(values), size)]
    return (
        _is_inside(values[:4])
        and len(values) % size == 4 % size
        and all(point[2:] in ([], [0], [1], [2]) for point in points)
        and all(
            (px == 0 and py == 0) or (abs(px - x) <= width / 2 + SLACK and abs(py - y) <= height / 2 + SLACK)
            for px, py, *_ in points
        )
    )


def _is_inside(box: list[float]) -> bool:
    """Whether centre x, y, width, height are a box in the image."""
    x, y, width, height = box
    return all(side / 2 - SLACK <= centre <= 1 - side / 2 + SLACK for centre, side in ((x, width), (y, height)))
