"""COCO content → everything that is wrong with it, and a copy without that.

The rules are those by which annotations.py refuses a whole file, told row by row; tests hold the two together. What can
be mended without guessing is mended, the rest is dropped, and every row is either kept or listed.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from detr_fabric.data.annotations import REQUIRED, has_area, leaves_image
from detr_fabric.data.categories import COCO91_CLASSES, Categories, Id, LabelSpace
from detr_fabric.data.columns import LARGEST, fours, inside, look_up, numbers, short, side
from detr_fabric.data.decoding import FileFault

Training = Literal["refuses", "stops", "drops", "clips", "keeps"]  # the worst first
Row = dict[str, Any]
Mask = np.ndarray  # (n,) bool, over the rows of a table

TRAINING: tuple[Training, ...] = ("refuses", "stops", "drops", "clips", "keeps")
READING_ORDER = ("categories", "images", "annotations")
NO_ID = "whose id is no whole number or string"
OFTEN = 0.3  # part of all boxes that leave their images, above which their format is in doubt


class Finding(NamedTuple):
    """One kind of fault: what has it, what training does with it and what the copy does."""

    what: str  # "annotations of an unknown image"
    training: Training
    copy: str  # "drops"
    entries: list[str]  # ids in the file's order; positions where an entry has none


class Repaired(NamedTuple):
    """What is wrong with a data set, and what is left of it."""

    content: dict[str, Any] | None  # accepted by annotations.py; None: there would be nothing to train on
    findings: list[Finding]  # the worst first
    rows: dict[str, tuple[int, int]]  # table → number of rows read, kept


def repair(
    content: dict[str, Any],
    training: Categories | None = None,
    label_space: LabelSpace = "contiguous",
    read_sizes: Callable[[list[Row]], list[tuple[int, int] | FileFault]] | None = None,
) -> Repaired:
    """Finds everything that training refuses, drops, clips, or keeps to its user's surprise. Changes nothing in place.

    training: categories of the training annotations, which the file must use; None: it brings its own. read_sizes:
    image entries → (height, width) of their files, or what is wrong with them; None: the files are not looked at.
    """
    findings: list[Finding] = []
    absent = [name for name in REQUIRED if not isinstance(content.get(name), list)]
    if absent:
        return Repaired(None, [Finding("lists are missing from the file", "refuses", "is impossible", absent)], {})

    categories, images, annotations = (_Table(name, content[name], findings) for name in READING_ORDER)
    known = _repair_categories(categories, training, label_space)
    _repair_images(images)
    unread = set() if read_sizes is None else _read_files(images, read_sizes)
    _drop_bad_ids(annotations, renumber=True)
    image = _find(annotations, "image", images, images.kept_ids(), unread)
    category = _find(annotations, "category", categories, known, set())
    _repair_values(annotations)
    _judge_boxes(annotations, images.kept(), image, category)

    tables = (categories, images, annotations)
    empty = [table.name for table in (categories, images) if not table.alive.any()]
    if empty:
        findings.append(Finding("lists have no usable entry", "refuses", "is impossible", empty))
    return Repaired(
        content=None if empty else content | {table.name: table.kept() for table in tables},
        findings=sorted(findings, key=lambda finding: TRAINING.index(finding.training)),
        rows={table.name: (len(table.rows), int(table.alive.sum())) for table in tables},
    )


class _Table:
    """A list of the file. A row is listed under every finding that it has, and goes if any of them drops it."""

    def __init__(self, name: str, rows: list[Any], findings: list[Finding]) -> None:
        self.name = name
        self.findings = findings
        self.given: list[Row] = [row if type(row) is dict else {} for row in rows]
        self.rows = self.given.copy()  # some of them changed
        self.alive = np.ones(len(rows), dtype=bool)
        self.whole = self.alive.copy()  # rows that can be judged: objects with all keys
        self.drop(np.array([type(row) is not dict for row in rows], dtype=bool), "that are no JSON objects")
        self.whole = self.alive.copy()
        for key in REQUIRED[name]:
            self.drop(np.array([key not in row for row in self.rows], dtype=bool), f"without {key!r}")
        self.whole = self.alive.copy()

    def each(self, test: Callable[[Row], bool]) -> Mask:
        """The rows that can be judged and pass a test."""
        judged = zip(self.rows, self.whole.tolist(), strict=True)
        return np.array([whole and test(row) for row, whole in judged], dtype=bool)

    def note(self, mask: Mask, what: str, training: Training = "keeps", copy: str = "keeps") -> None:
        """Lists the rows of a mask as a finding."""
        found = np.flatnonzero(mask & self.whole).tolist()
        if found:
            entries = [short(self.given[row]["id"]) if "id" in self.given[row] else f"number {row}" for row in found]
            self.findings.append(Finding(f"{self.name} {what}", training, copy, entries))

    def drop(self, mask: Mask, what: str, training: Training = "refuses") -> None:
        """Lists the rows of a mask, and drops them."""
        self.note(mask, what, training, "drops")
        self.alive &= ~mask

    def change(self, mask: Mask, what: str, copy: str, changed: Callable[[Row], Row]) -> None:
        """Lists the rows of a mask, which training refuses, and puts changed copies in their place."""
        self.note(mask, what, "refuses", copy)
        for row in np.flatnonzero(mask):
            self.rows[row] = changed(self.rows[row])

    def kept(self) -> list[Row]:
        return list(itertools.compress(self.rows, self.alive.tolist()))

    def kept_ids(self) -> list[Id]:
        return [row["id"] for row in self.kept()]

    def living(self, column: Iterable[Hashable]) -> list[Hashable | None]:
        """A column with None for the rows that were dropped."""
        return [value if alive else None for value, alive in zip(column, self.alive.tolist(), strict=True)]


def _repair_categories(table: _Table, training: Categories | None, label_space: LabelSpace) -> list[Id]:
    """The category ids that annotations may name."""
    unnamed = table.each(lambda row: not isinstance(row["name"], str))
    table.change(
        unnamed, "whose name is no string", "writes it as one", lambda row: row | {"name": json.dumps(row["name"])}
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
    table.note(_repeated(table.living(row.get("name") for row in table.rows)), "with the name of an earlier one")
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
    table.note(_repeated(table.living(row.get("file_name") for row in table.rows)), "with the file of an earlier one")


def _read_files(table: _Table, read_sizes: Callable[[list[Row]], list[tuple[int, int] | FileFault]]) -> set[Id]:
    """Drops images at whose file training would stop, and returns their ids; fills in the sizes that are missing."""
    faults: dict[str, list[str]] = {}
    rows = np.flatnonzero(table.alive).tolist()
    for row, found in zip(rows, read_sizes([table.rows[row] for row in rows]), strict=True):
        image = table.rows[row]
        if isinstance(found, FileFault):
            faults.setdefault(found.kind, []).append(f"{short(image['id'])} {found.detail}")
            table.alive[row] = False
        elif not (image.get("height") and image.get("width")):
            table.rows[row] = image | {"height": found[0], "width": found[1]}
    table.findings += [Finding(f"images {kind}", "stops", "drops", found) for kind, found in faults.items()]
    return {table.rows[row]["id"] for row in rows if not table.alive[row]}


def _find(table: _Table, what: str, target: _Table, known: list[Id], unread: set[Id]) -> np.ndarray:
    """(m,) place among the known ids that each annotation names; those that name another one, at -1, are dropped.

    target: the table in which the ids are; unread: ids that were dropped because training would stop there.
    """
    column = [row.get(f"{what}_id") for row in table.rows]
    place = look_up(column, {id: number for number, id in enumerate(known)})
    lost = place < 0
    dropped = {row["id"] for row, alive in zip(target.rows, target.alive, strict=True) if not alive and _is_id(row)}
    of_unread = lost & (look_up(column, dict.fromkeys(unread, 0)) == 0)
    of_dropped = lost & ~of_unread & (look_up(column, dict.fromkeys(dropped, 0)) == 0)
    table.drop(of_unread, f"of {what}s at which training stops", training="stops")
    table.drop(of_dropped, f"of a dropped {what}")
    table.drop(lost & ~of_unread & ~of_dropped, f"of an unknown {what}")
    return place


def _repair_values(table: _Table) -> None:
    boxes = fours([row.get("bbox") for row in table.rows])
    table.drop(~(np.abs(boxes) < LARGEST).all(1), "whose bbox is not four finite numbers")
    crowd = table.each(lambda row: row.get("iscrowd") not in (None, 0, 1))
    table.change(crowd, "whose iscrowd is not 0 or 1", "removes it", lambda row: _without(row, "iscrowd"))
    areas = numbers([0 if row.get("area") is None else row["area"] for row in table.rows])
    infinite = ~(np.abs(areas) < LARGEST**2) & table.whole
    table.change(infinite, "whose area is no finite number", "removes it", lambda row: _without(row, "area"))


def _judge_boxes(table: _Table, images: list[Row], image: np.ndarray, category: np.ndarray) -> None:
    """Drops boxes without area in their image, and lists what is odd. image, category: (m,) place of each object's."""
    boxes = fours([row.get("bbox") for row in table.rows])  # (m, 4) x, y, width, height
    known = [(side(row.get("height")), side(row.get("width"))) for row in images] + [(0, 0)]  # the last one is at -1
    sizes = np.array(known)[image]  # (m, 2) height, width
    with np.errstate(all="ignore"):  # of boxes dropped above
        empty, leaves = ~has_area(boxes, sizes), leaves_image(boxes, sizes)
    table.drop(table.alive & empty, "whose box has no area in its image", training="drops")
    leaves &= table.alive
    table.note(leaves, "whose box leaves its image by more than 1 pixel", training="clips")
    if leaves.sum() > OFTEN * table.alive.sum():
        _doubt(table, "boxes leave their images so often that they may be corners, where COCO has x, y, width, height")
    if table.alive.any() and boxes[table.alive].max() <= 1:
        _doubt(table, "no box reaches beyond the first pixel: they may be fractions, where COCO has pixels")
    objects = np.column_stack([image, category, boxes]).view("V48")[:, 0].tolist()
    table.note(_repeated(table.living(objects)), "with image, class and box of an earlier one")


def _doubt(table: _Table, what: str) -> None:
    table.findings.append(Finding(what, "keeps", "", []))


def _without(row: Row, key: str) -> Row:
    return {name: value for name, value in row.items() if name != key}


def _is_id(row: Row) -> bool:
    """Whether an entry has an id that check_ids accepts."""
    id = row.get("id")
    return type(id) is int and abs(id) < 2**63 or type(id) is str and "\0" not in id


def _repeated(values: Iterable[Hashable | None]) -> Mask:
    """Which values came before; None never did."""
    seen: set[Hashable] = set()
    repeated = []
    for value in values:
        repeated.append(value is not None and value in seen)
        seen.add(value)
    return np.array(repeated, dtype=bool)


def _drop_bad_ids(table: _Table, renumber: bool = False) -> None:
    """Drops rows without an id of their own; renumber: only those that repeat a whole row, others get a new id."""
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
