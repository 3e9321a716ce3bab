"""Checks the fields of annotation files. Every kind of problem names the entries that have it and the cure."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from detr_fabric.data.formats.categories import Id

LARGEST = 1e9  # pixels; larger coordinates are refused, as infinite ones are
LARGEST_AREA = 1e10  # square pixels; COCO's scoring ignores objects with a negative or larger area


class Content(NamedTuple):
    """What an annotation file holds, in any format."""

    tables: dict[str, Any]  # images, annotations and categories, as in a COCO file
    notes: list[str]  # what the user should know about how it was read
    converted: bool = False  # from a format other than COCO's


class Problem(NamedTuple):
    """One kind of problem in an annotation file, with all entries that have it."""

    kind: str
    ids: tuple[Any, ...]  # of the entries; positions where they have no usable id
    message: str  # one sentence: how many, the first ids, the cure; without the file's name


class Problems(list[Problem]):
    """The problems found so far."""

    def report(self, kind: str, ids: Sequence[Any], what: str, cure: str) -> None:
        """Adds a problem if `ids` is not empty: `3 images have ... (5, 7, 9): correct them`."""
        if ids:
            shown = ", ".join(short(id) for id in ids[:3]) + (", ..." if len(ids) > 3 else "")
            self.append(Problem(kind, tuple(ids), f"{len(ids)} {what} ({shown}): {cure}"))


def check_ids(what: str, ids: list[Any], problems: Problems) -> bool:
    """Whether ids are distinct and all 64-bit integers or all strings."""
    wrong = [id for id in ids if not (type(id) is int and abs(id) < 2**63 or type(id) is str and "\0" not in id)]
    if wrong:
        problems.report(f"{what} id", wrong, f"{what} ids are no whole numbers or strings", "correct them")
        return False
    if len(set(map(type, ids))) > 1:
        strings = [id for id in ids if type(id) is str]
        problems.report(f"{what} id", strings, f"{what} ids are strings among numbers", "use one of both")
        return False
    if len(set(ids)) < len(ids):
        repeated = [id for id, count in Counter(ids).items() if count > 1]
        problems.report(f"duplicate {what} id", repeated, f"{what} ids are used more than once", "make them unique")
        return False
    return True


def look_up(ids: list[Any], table: dict[Id, int]) -> np.ndarray:
    """(n,) int64 value of each id in the table; -1 for ids that it lacks."""
    return np.array([table.get(id, -1) if type(id) in (int, str) else -1 for id in ids], dtype=np.int64)


def where(bad: np.ndarray, ids: list[Any]) -> list[Any]:
    """The ids of the rows where a (n,) mask is True."""
    return [ids[row] for row in np.flatnonzero(bad)]


def numbers(values: list[Any]) -> np.ndarray:
    """(n,) float64; NaN or infinite where a value is not a usable number."""
    if set(map(type, values)) <= {int, float}:
        try:
            return np.array(values, dtype=np.float64)
        except OverflowError:  # an integer of hundreds of digits
            pass
    return np.array([_number(value) for value in values], dtype=np.float64)


def fours(values: list[Any]) -> np.ndarray:
    """(n, 4) float64; not finite where a value is not a list of four numbers."""
    unusable = (float("nan"),) * 4
    rows = (value if type(value) is list and len(value) == 4 else unusable for value in values)
    return numbers(list(chain.from_iterable(rows))).reshape(-1, 4)


def side(value: Any) -> int:
    """A width or height in pixels: 0 if it is missing, -1 if it is wrong."""
    if value is None:
        return 0
    return int(value) if type(value) in (int, float) and 1 <= value < LARGEST and value == int(value) else -1


def inside(name: Any) -> bool:
    """Whether a file name is a relative path that stays inside its folder, also on Windows."""
    if not isinstance(name, str) or not 0 < len(name) < 4096 or "\0" in name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return not name.startswith(("/", "\\")) and ".." not in re.split(r"[/\\]", name) and name[1:2] != ":"


def is_name(value: Any) -> bool:
    """Whether a value is text that can be written; JSON can hold halves of characters, which can't."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _number(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float) else float("nan")
    except OverflowError:
        return float("inf")


def short(id: Any) -> str:
    """An id in a message: strings in quotes, long ones cut."""
    text = ascii(id)
    return text if len(text) <= 40 else text[:37] + "..."
