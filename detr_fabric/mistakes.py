"""What a model gets wrong: detections paired with objects one by one, the table of classes taken for others, and how
well each image went.

Not how COCO scores: one threshold instead of all, and pairs across classes. Shapes: N objects, M detections, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IOU = 0.5  # smallest overlap of a pair
TABLE = 12  # most classes of which a whole table is printed
MOST = 8  # lines of each kind of mistake instead of it


class Objects(NamedTuple):
    """The true objects of one image."""

    boxes: np.ndarray  # (N, 4) float64 xyxy
    labels: np.ndarray  # (N,) int64
    crowd: np.ndarray  # (N,) bool


class Pairs(NamedTuple):
    """The objects of one image, crowds left out, and the detections that count."""

    true: np.ndarray  # (N,) labels
    found: np.ndarray  # (M,) labels, the surest first
    partner: np.ndarray  # (M,) the object of each detection, -1: none
    places: np.ndarray  # (N, 4) the objects' boxes, xyxy

    @property
    def right(self) -> np.ndarray:
        """(M,) whether a detection has a partner of its class."""
        return np.array(
            [p >= 0 and self.true[p] == label for p, label in zip(self.partner, self.found, strict=True)], bool
        )

    @property
    def missed(self) -> np.ndarray:
        """The objects that no detection of their class has as partner."""
        return np.setdiff1d(np.arange(len(self.true)), self.partner[self.right])

    @property
    def mistakes(self) -> int:
        """Missed objects, and detections that are not right."""
        return len(self.missed) + int((~self.right).sum())

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 where there is nothing, and nothing is found."""
        total = len(self.true) + len(self.found)
        return 2 * int(self.right.sum()) / total if total else 1.0


def pair(objects: Objects, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, threshold: float) -> Pairs:
    """Detections with boxes (M, 4) xyxy → pairs. The surest first, each takes the object, of whatever class, that it
    overlaps most of those left, if by IOU at least. What has no partner but lies in a crowd of its class, by half of
    its area at least, does not count."""
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= threshold]
    places = objects.boxes[~objects.crowd]
    overlap = _iou(boxes[order], places)  # (M, N)
    in_crowd = _inside(boxes[order], objects.boxes[objects.crowd]) >= IOU
    in_crowd &= labels[order][:, None] == objects.labels[objects.crowd]
    partner, counts = np.full(len(order), -1), np.ones(len(order), bool)
    for row in range(len(order)):
        best = int(overlap[row].argmax()) if len(places) else -1
        if best >= 0 and overlap[row, best] >= IOU:
            partner[row] = best
            overlap[:, best] = -1
        else:
            counts[row] = not in_crowd[row].any()
    return Pairs(objects.labels[~objects.crowd], labels[order][counts], partner[counts], places)


def confusion(images: Sequence[Pairs], classes: int) -> np.ndarray:
    """(C+1, C+1) counts of [true, found]; the last row and column are the background: found where there is nothing,
    and missed."""
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for pairs in images:
        true = np.append(pairs.true, classes)[pairs.partner]  # -1, no partner, is the background
        np.add.at(counts, (true, pairs.found), 1)
        alone = np.setdiff1d(np.arange(len(pairs.true)), pairs.partner)
        np.add.at(counts, (pairs.true[alone], classes), 1)
    return counts


def describe(counts: np.ndarray, names: Sequence[str]) -> list[str]:
    """The table as lines, of the classes that occur; of many classes only the most frequent mistakes."""
    background = len(names)
    seen = [k for k in range(background) if counts[k].any() or counts[:, k].any()]
    if len(seen) > TABLE:
        return _most_frequent(counts, names)
    rows = [*seen, background]
    heads = [*(_short(names[k], 14) for k in seen), "missed"]
    firsts = [*(_short(names[k], 20) for k in seen), "nothing there"]
    left = max(map(len, firsts))
    widths = [max(len(head), len(str(counts[rows, k].max())), 3) for head, k in zip(heads, rows, strict=True)]
    lines = ["  ".join([" " * left, *(head.rjust(w) for head, w in zip(heads, widths, strict=True))])]
    for first, row in zip(firsts, rows, strict=True):
        cells = ["" if row == k == background else str(counts[row, k]) for k in rows]
        lines.append("  ".join([first.ljust(left), *(cell.rjust(w) for cell, w in zip(cells, widths, strict=True))]))
    return [line.rstrip() for line in lines]


def _most_frequent(counts: np.ndarray, names: Sequence[str]) -> list[str]:
    """The most frequent mistakes of each kind."""
    background = len(names)
    right, total = int(counts.diagonal().sum()), int(counts[:background].sum())
    lines = [f"{right} of {total} objects found under their name; most frequent mistakes:"]
    taken, missed, made_up = (np.zeros_like(counts) for _ in range(3))
    taken[:-1, :-1] = (counts - np.diag(counts.diagonal()))[:-1, :-1]
    missed[:-1, -1], made_up[-1, :-1] = counts[:-1, -1], counts[-1, :-1]
    for kind in (taken, missed, made_up):
        for place in np.argsort(-kind, axis=None, kind="stable")[:MOST]:
            true, found = divmod(int(place), background + 1)
            if (count := int(kind[true, found])) == 0:
                break
            if true == background:
                lines.append(f"{names[found]} where there is none, {count} of {counts[:, found].sum()} found")
            else:
                what = "missed" if found == background else f"taken for {names[found]}"
                lines.append(f"{names[true]} {what}, {count} of {counts[true].sum()}")
    return lines


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1)


def _shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M, 4), (N, 4) → (M, N) areas."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clip(min=0).prod(-1)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    shared = _shared(a, b)
    return shared / np.maximum(_area(a)[:, None] + _area(b) - shared, 1e-12)


def _inside(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M, N) the part of each box a that lies in a box b."""
    return _shared(a, b) / np.maximum(_area(a)[:, None], 1e-12)
