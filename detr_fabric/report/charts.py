"""Which curves the page draws, from the records of its runs.

A chart is {group, title, series}; a series is {run, label, style, at, values}: style is "main", "dashed" (validation,
or what a line is compared with) or "layer" (shown on demand); `at` says which of the run's places the values belong
to, those of its training records or of its evaluations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from detr_fabric.report.records import Record, RunRecords

Series = dict[str, Any]
DIGITS = 6  # of a value in the page
SITES = {
    "decoder_cross": "Decoder cross-attention",
    "encoder_self": "Encoder self-attention",
    "decoder_self": "Decoder self-attention",
}
MEASURES = {  # of attention/<site>/layer<l>/
    "zeros": "Share of weights that are 0",
    "support": "Keys read by a query",
    "paibb": "Attention inside the box (PAIBB)",
    "entropy": "Entropy of a query (nats)",
    "gini": "Gini index",
    "near_zeros": "Share of weights below 1e-6",
}


class Curve(NamedTuple):
    """Values of records under one name, or their mean over layers."""

    key: str  # a regular expression of names in log.jsonl; a group in it is the label
    style: str = "main"
    label: str = ""
    mean: bool = False  # over all names that match


EVEN = Curve("attention/box_area", "dashed", "even attention")  # the box's part of the image


def loss(name: str) -> list[Curve]:
    layers = Curve(rf"train/{name}_(\d+)", "layer", "layer ")
    return [Curve(f"train/{name}", label="training"), Curve(f"val/{name}", "dashed", "validation"), layers]


def by_layer(key: str) -> list[Curve]:
    return [Curve(key, label="mean", mean=True), Curve(key, "layer", "layer ")]


CHARTS: dict[str, dict[str, list[Curve]]] = {
    "Losses": {
        "Loss": loss("loss"),
        "Classification loss": loss("loss_ce"),
        "L1 loss of boxes": loss("loss_bbox"),
        "GIoU loss": loss("loss_giou"),
        "Class error (%)": loss("class_error"),
        "Cardinality error": loss("cardinality_error"),
    },
    "Average precision": {
        "AP": [Curve("val/AP")],
        "AP50": [Curve("val/AP50")],
        "AP75": [Curve("val/AP75")],
        "AP of small objects": [Curve("val/APs")],
        "AP of medium objects": [Curve("val/APm")],
        "AP of large objects": [Curve("val/APl")],
    },
    "Optimisation and speed": {
        "Learning rate": [Curve("lr/(transformer)"), Curve("lr/((?!transformer).*)", "dashed")],
        "Gradient norm before clipping": [Curve("grad_norm")],
        "Images a second": [Curve("images_per_second")],
        "Share of time spent waiting for data": [Curve("data_wait")],
        "Peak memory (GiB)": [Curve("memory_gb")],
        "Unreadable images so far": [Curve("skipped_images")],
    },
    **{
        title: {
            name: [
                *by_layer(rf"attention/{site}/layer(\d+)/{measure}"),
                *([EVEN] if (site, measure) == ("decoder_cross", "paibb") else []),
            ]
            for measure, name in MEASURES.items()
        }
        | {"Learned α": by_layer(rf"alpha/{site}/layer(\d+)")}
        for site, title in SITES.items()
    },
}


def charts(training: Sequence[Sequence[Record]], runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """All charts that have a value. training: the runs' training records, thinned."""
    made = []
    for group, titles in CHARTS.items():
        for title, curves in titles.items():
            drawn = [
                series
                for number, run in enumerate(runs)
                for curve in curves
                for series in _series(number, curve, {"training": training[number], "evaluations": run.evaluations})
            ]
            if drawn:
                made.append({"group": group, "title": title, "series": drawn})
    return made


def _series(run: int, curve: Curve, places: dict[str, Sequence[Record]]) -> list[Series]:
    """The lines of one curve, from whichever records have its names."""
    for at, records in places.items():
        found = {key: match for r in records for key in r if (match := re.fullmatch(curve.key, key))}
        columns = {key: [record.get(key) for record in records] for key in found}
        if curve.mean and found:
            return _line(run, curve, curve.label, at, [_mean(values) for values in zip(*columns.values(), strict=True)])
        lines = []
        for key, match in found.items():
            lines += _line(run, curve, curve.label + (match[1] if match.re.groups else ""), at, columns[key])
        if lines:
            return lines
    return []


def _line(run: int, curve: Curve, label: str, at: str, values: Sequence[float | None]) -> list[Series]:
    """One line, or none where no value is defined: scores are -1 where there is no object."""
    undefined = -1 if curve.key.startswith("val/AP") else None
    shown = [None if value == undefined else rounded(value) for value in values]
    if all(value is None for value in shown):
        return []
    return [{"run": run, "label": label, "style": curve.style, "at": at, "values": shown}]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def rounded(value: float | None) -> float | None:
    """To DIGITS significant digits, so that the page stays small."""
    return None if value is None else float(f"{value:.{DIGITS}g}")
