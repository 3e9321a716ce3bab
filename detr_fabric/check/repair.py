"""Finds everything that is wrong with COCO content, and makes a copy without it.

annotations.py refuses a whole file by these rules; here they are applied row by row, and tests hold the two together.
What can be repaired without guessing is repaired, the rest is dropped, and every row is either kept or listed.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from detr_fabric.check.decoding import FileProblem, FileSize
from detr_fabric.data.formats.annotations import REQUIRED, has_area, leaves_image
from detr_fabric.data.formats.categories import COCO91_CLASSES, Categories, Id, LabelSpace
from detr_fabric.data.formats.fields import LARGEST, LARGEST_AREA, fours, inside, is_name, look_up, numbers, short, side

Training = Literal["refuses", "stops", "drops", "clips", "keeps"]  # what training does, worst first
Row = dict[str, Any]
Mask = np.ndarray  # (n,) bool, over the rows of a table

TRAINING: tuple[Training, ...] = ("refuses", "stops", "drops", "clips", "keeps")
READING_ORDER = ("categories", "images", "annotations")
NO_ID = "whose id is no whole number or string"


class Finding(NamedTuple):
    """One kind of problem: which entries have it, what training does about it, and what the copy does."""

    what: str  # "annotations of an unknown image"
    training: Training
    copy: str  # "drops"
    entries: list[str]  # ids in the file's order, or positions of entries without an id


class Repaired(NamedTuple):
    """What is wrong with a data set, and what is left of it."""

    tables: dict[str, Any] | None  # annotations.py accepts it; None: nothing would be left to train on
    findings: list[Finding]  # worst first
    rows: dict[str, tuple[int, int]]  # table → number of rows read, kept


def repair(
    tables: dict[str, Any],
    training: Categories | None = None,
    label_space: LabelSpace = "contiguous",
    read_sizes: Callable[[list[Row]], list[FileSize | FileProblem]] | None = None,
) -> Repaired:
    """Finds everything that training refuses, drops, clips, or surprisingly keeps. Changes nothing in place.

    training: categories of the training annotations, which the file must use; None: its own. read_sizes: takes image
    entries and gives the sizes of their files, or what is wrong with them; None: don't look at the files.
    """
    findings: list[Finding] = []
    absent = [name for name in REQUIRED if not isinstance(tables.get(name), list)]
    if absent:
        return Repaired(None, [Finding("lists are missing from the file", "refuses", "is impossible", absent)], {})

    categories, images, annotations = (_Table(name, tables[name], findings) for name in READING_ORDER)
    known = _repair_categories(categories, training, label_space)
    _repair_images(images)
    unread = set() if read_sizes is None else _read_files(images, read_sizes)
    _drop_bad_ids(annotations, renumber=True)
    image = _find(annotations, "image", images, images.kept_ids(), unread)
    category = _find(annotations, "category", categories, known, set())
    _repair_values(annotations)
    _judge_boxes(annotations, images.kept(), image, category)

    all_three = (categories, images, annotations)
    empty = [table.name for table in (categories, images) if not table.alive.any()]
    if empty:
        findings.append(Finding("lists have no usable entry", "refuses", "is impossible", empty))
    return Repaired(
        tables=None if empty else tables | {table.name: table.kept() for table in all_three},
        findings=sorted(findings, key=lambda finding: TRAINING.index(finding.training)),
        rows={table.name: (len(table.rows), int(table.alive.sum())) for table in all_three},
    )


class _Table:
    """One list of the file. A row is listed under each of its findings, and dropped if any of them drops it."""

    def __init__(self, name: str, rows: list[Any], findings: list[Finding]) -> None:
        self.name = name
        self.findings = findings
        self.given: list[Row] = [row if type(row) is dict else {} for row in rows]
        self.rows = self.given.copy()  # some will be changed
        self.alive = np.ones(len(rows), dtype=bool)
        self.whole = self.alive.copy()  # rows that can be judged: JSON objects with all required keys
        self.drop(np.array([type(row) is not dict for row in rows], dtype=bool), "that are no JSON objects")
        self.whole = self.alive.copy()
        for key in REQUIRED[name]:
            self.drop(np.array([key not in row for row in self.rows], dtype=bool), f"without {key!r}")
        self.whole = self.alive.copy()

    def each(self, test: Callable[[Row], bool]) -> Mask:
        """Mask of the rows that can be judged and for which a test is true."""
        judged = zip(self.rows, self.whole.tolist(), strict=True)
        return np.array([whole and test(row) for row, whole in judged], dtype=bool)

    def note(self, mask: Mask, what: str, training: Training = "keeps", copy: str = "keeps") -> None:
        """Adds a finding for the rows of a mask, if there are any."""
        found = np.flatnonzero(mask & self.whole).tolist()
        if found:
            entries = [short(self.given[row]["id"]) if "id" in self.given[row] else f"number {row}" for row in found]
            self.findings.append(Finding(f"{self.name} {what}", training, copy, entries))

    def drop(self, mask: Mask, what: str, training: Training = "refuses") -> None:
        """Adds a finding for the rows of a mask, and drops them."""
        self.note(mask, what, training, "drops")
        self.alive &= ~mask

    def change(self, mask: Mask, what: str, copy: str, changed: Callable[[Row], Row]) -> None:
        """Adds a finding for the rows of a mask, which training refuses, and replaces them by changed copies."""
        self.note(mask, what, "refuses", copy)
        for row in np.flatnonzero(mask):
            self.rows[row] = changed(self.rows[row])

    def kept(self) -> list[Row]:
        return list(itertools.compress(self.rows, self.alive.tolist()))

    def kept_ids(self) -> list[Id]:
        return [row["id"] for row in self.kept()]

    def of_kept(self, values: Iterable[Hashable]) -> list[Hashable | None]:
        """One value a row, None instead for the rows that were dropped."""
        return [value if alive else None for value, alive in zip(values, self.alive.tolist(), strict=True)]


def _repair_categories(table: _Table, training: Categories | None, label_space: LabelSpace) -> list[Id]:
    """Returns the category ids that annotations may have."""
    unnamed = table.each(lambda row: not is_name(row["name"]))
    table.change(
        unnamed, "whose name is no text", "writes it as one", lambda row: row | {"name": json.dumps(row["name"])}
    )
    _drop_bad_ids(table)
    if training is not None:
        expected = dict(zip(training.ids, training.names, strict=True))
        other = table.alive & table.each(
            lambda row: _is_id(row) and expected.get(row["id"], row["name"]) != row["name"]
        )
        table.drop(other, "with another name than in the training annotations")
        taken = {row["id"] for row in itertools.compress(table.rows, other)}
        return [id for id in training.ids if id not in taken]
    if label_space == "coco91":
        foreign = table.each(lambda row: not (type(row["id"]) is int and 1 <= row["id"] < COCO91_CLASSES))
        table.drop(foreign & table.alive, f"with an id outside COCO's 1 to {COCO91_CLASSES - 1}")
    table.note(_repeated(table.of_kept(row.get("name") for row in table.rows)), "with the name of an earlier one")
    return table.kept_ids()


def _repair_images(table: _Table) -> None:
    _drop_bad_ids(table)
    table.drop(
        table.each(lambda row: not inside(row["file_name"])), "whose file_name is no path inside the image folder"
    )
    sides = ("height", "width")
    table.change(
        table.each(lambda row: any(side(row.get(key)) < 0 for key in sides)),
        "whose width or height is no positive whole number",
        "removes it",
        lambda row: {key: value for key, value in row.items() if key not in sides or side(value) > 0},
    )
    table.note(_repeated(table.of_kept(row.get("file_name") for row in table.rows)), "with the file of an earlier one")


def _read_files(table: _Table, read_sizes: Callable[[list[Row]], list[FileSize | FileProblem]]) -> set[Id]:
    """Drops images at whose file training would stop, and returns their ids. Fills in missing sizes."""
    problems: dict[str, list[str]] = {}
    tags = np.zeros(len(table.rows), dtype="U8")
    rows = np.flatnonzero(table.alive).tolist()
    for row, found in zip(rows, read_sizes([table.rows[row] for row in rows]), strict=True):
        image = table.rows[row]
        if isinstance(found, FileProblem):
            problems.setdefault(found.kind, []).append(f"{short(image['id'])} {found.detail}")
            table.alive[row] = False
            continue
        tags[row] = found.tag
        if not (image.get("height") and image.get("width")):
            table.rows[row] = image | {"height": found.height, "width": found.width}
    table.note(tags == "ignored", "with an orientation tag, ignored as by COCO's tools")
    table.note(tags == "turned", "turned by their orientation tag")
    table.findings += [Finding(f"images {kind}", "stops", "drops", found) for kind, found in problems.items()]
    return {table.rows[row]["id"] for row in rows if not table.alive[row]}


def _find(table: _Table, what: str, target: _Table, known: list[Id], unread: set[Id]) -> np.ndarray:
    """(m,) position of each annotation's image or category in `known`. Drops annotations without one, which get -1.

    target: the table of the images or categories; unread: ids that were dropped because training would stop there.
    """
    ids = [row.get(f"{what}_id") for row in table.rows]
    position = look_up(ids, {id: number for number, id in enumerate(known)})
    lost = position < 0
    dropped = {row["id"] for row, alive in zip(target.rows, target.alive, strict=True) if not alive and _is_id(row)}
    of_unread = lost & (look_up(ids, dict.fromkeys(unread, 0)) == 0)
    of_dropped = lost & ~of_unread & (look_up(ids, dict.fromkeys(dropped, 0)) == 0)
    table.drop(of_unread, f"of {what}s at which training stops", training="stops")
    table.drop(of_dropped, f"of a dropped {what}")
    table.drop(lost & ~of_unread & ~of_dropped, f"of an unknown {what}")
    return position


def _repair_values(table: _Table) -> None:
    boxes = fours([row.get("bbox") for row in table.rows])
    table.drop(~(np.abs(boxes) < LARGEST).all(1), "whose bbox is not four finite numbers")
    crowd = table.each(lambda row: row.get("iscrowd") not in (None, 0, 1))
    table.change(crowd, "whose iscrowd is not 0 or 1", "removes it", lambda row: _without(row, "iscrowd"))
    areas = numbers([0 if row.get("area") is None else row["area"] for row in table.rows])
    impossible = ~((areas >= 0) & (areas <= LARGEST_AREA)) & table.whole
    what = f"whose area is no number from 0 to {LARGEST_AREA:.0e}"
    table.change(impossible, what, "removes it", lambda row: _without(row, "area"))


def _judge_boxes(table: _Table, images: list[Row], image: np.ndarray, category: np.ndarray) -> None:
    """Drops boxes without area in their image, and lists odd ones. image, category: (m,), as from _find."""
    boxes = fours([row.get("bbox") for row in table.rows])  # (m, 4) x, y, width, height
    known = [(side(row.get("height")), side(row.get("width"))) for row in images]
    sizes = np.array([*known, (0, 0)])[image]  # (m, 2) height, width; position -1 has none
    with np.errstate(all="ignore"):  # the boxes dropped above
        empty, leaves = ~has_area(boxes, sizes), leaves_image(boxes, sizes)
    table.drop(table.alive & empty, "whose box has no area in its image", training="drops")
    leaves &= table.alive
    table.note(leaves, "whose box leaves its image by more than 1 pixel", training="clips")
    objects = np.column_stack([image, category, boxes]).view("V48")[:, 0].tolist()
    table.note(_repeated(table.of_kept(objects)), "with image, class and box of an earlier one")


def _without(row: Row, key: str) -> Row:
    return {name: value for name, value in row.items() if name != key}


def _is_id(row: Row) -> bool:
    """Whether an entry has an id that check_ids accepts."""
    id = row.get("id")
    return type(id) is int and abs(id) < 2**63 or type(id) is str and "\0" not in id


def _repeated(values: Iterable[Hashable | None]) -> Mask:
    """Mask of the values that came before; None never counts."""
    seen: set[Hashable] = set()
    repeated = []
    for value in values:
        repeated.append(value is not None and value in seen)
        seen.add(value)
    return np.array(repeated, dtype=bool)


def _drop_bad_ids(table: _Table, renumber: bool = False) -> None:
    """Drops rows without an id of their own. renumber: gives them a new id, unless they repeat a whole row."""
    usable = table.each(_is_id)
    kinds = Counter(type(row["id"]) for row in itertools.compress(table.rows, usable))
    kind = str if kinds[str] > kinds[int] else int
    unusable = table.each(lambda row: "id" in row) & ~usable
    other = usable & table.each(lambda row: type(row.get("id")) is not kind)
    first: dict[Id, Row] = {}
    same, again = np.zeros_like(usable), np.zeros_like(usable)
    for number in np.flatnonzero(usable & ~other).tolist():
        row = table.rows[number]
        if row["id"] in first:
            (same if row == first[row["id"]] else again)[number] = True
        else:
            first[row["id"]] = row
    table.drop(same, "that repeat an earlier one entirely")
    mixed = "whose id is a number among strings" if kind is str else "whose id is a string among numbers"
    if renumber:
        fresh = (id for id in map(kind, itertools.count(1)) if id not in first)
        for mask, what in ((unusable, NO_ID), (other, mixed), (again, "with the id of an earlier one")):
            table.change(mask, what, "gives new ids", lambda row: row | {"id": next(fresh)})
    else:
        table.drop(unusable, NO_ID)
        table.drop(other, mixed)
        table.drop(again, "with the id of an earlier one")
