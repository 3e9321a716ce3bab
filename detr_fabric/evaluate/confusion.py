"""Which classes are taken for which: the confusion matrix, and how it is printed.

Not how COCO scores: one threshold instead of all, and matches across classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detr_fabric.evaluate.match import IOU, DetectionMatches, counted

TABLE = 12  # most classes of which a whole table is printed
MOST = 8  # lines of each kind of mistake instead of it


def confusion(matches: DetectionMatches, classes: int, threshold: float) -> np.ndarray:
    """(C+1, C+1) counts of [true, found]; the last row and column are the background: found where there is nothing,
    and missed.

    By descending score, each detection that scores `threshold` or more takes the object, of whatever class, that it
    overlaps most among those left, if their IoU is at least IOU.
    """
    evaluation = counted(matches, classes)
    matrix = evaluation.confusion_matrix(IOU, max_det=len(matches.scores), min_score=threshold)["matrix"]
    return np.asarray(matrix).astype(np.int64)


def table(counts: np.ndarray, names: Sequence[str]) -> list[str]:
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
