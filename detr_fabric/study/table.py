"""What the table and the figure of a study show, from the records of its runs.

    AP50, AP     of the last evaluation
    zeros        part of the weights of decoder cross-attention that are exactly 0
    keys         of decoder cross-attention with a weight other than 0, a query
    Gini, PAIBB  of decoder cross-attention, see analysis/measures.py
    alpha        learned, of decoder cross-attention
    AP50@N       of the evaluation after step N, where the study names it
    s/step       seconds an optimizer step: median of the last quarter of the records, all of the mapping itself;
                 worth reading only if nothing else ran on the machine

Measures of the attention are means over layers and heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from detr_fabric.analysis.tables import Table, summarize
from detr_fabric.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {"AP50": 3, "AP": 3, "zeros": 3, "keys": 1, "Gini": 3, "PAIBB": 3, "alpha": 2, "s/step": 2}  # decimals
LAYERS = {
    "zeros": ("attention/decoder_cross/", "/zeros"),
    "keys": ("attention/decoder_cross/", "/support"),
    "Gini": ("attention/decoder_cross/", "/gini"),
    "PAIBB": ("attention/decoder_cross/", "/paibb"),
    "alpha": ("alpha/decoder_cross/", ""),
}


def measured(records: Sequence[dict[str, Any]], config: Config) -> dict[str, float]:
    """The measures of a finished run, those that its records hold."""
    last = [record for record in records if "val/AP" in record][-1]
    values = {name: last[f"val/{name}"] for name in ("AP50", "AP") if last[f"val/{name}"] >= 0}  # -1: without objects
    values |= {f"AP50@{record['step']}": record["val/AP50"] for record in records if record.get("val/AP50", -1) >= 0}
    for measure, (start, end) in LAYERS.items():
        if layers := [value for key, value in last.items() if key.startswith(start) and key.endswith(end)]:
            values[measure] = fmean(layers)
    if speeds := [record["images_per_second"] for record in records if "images_per_second" in record]:
        images = config.train.batch_size * config.train.accumulate * (config.train.devices or 1)
        values["s/step"] = images / median(speeds[-max(1, len(speeds) // 4) :])
    return values


def table_of(runs: Mapping[str, Sequence[dict[str, float]]], steps: Sequence[int] = ()) -> Table:
    """A row for each configuration, from the measures of its finished runs; `steps`: columns of AP50 after these."""
    measures = {f"AP50@{step}": 3 for step in steps} | MEASURES
    rows = [
        ([name, str(len(mine))], [summarize([run[measure] for run in mine if measure in run]) for measure in measures])
        for name, mine in runs.items()
    ]
    return Table(("configuration", "seeds"), measures, rows)


def figure_of_steps(table: Table, steps: Sequence[int]) -> Figure:
    """AP50 over steps, a line for each configuration; bars are standard deviations."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 3.4), layout="constrained")
    axis = drawn.subplots()
    for (name, _), values in table.rows:
        points = [(step, value) for step, value in zip(steps, values, strict=False) if value is not None]
        means, bars = [value.mean for _, value in points], [value.deviation or 0.0 for _, value in points]
        axis.errorbar([step for step, _ in points], means, bars, marker="o", capsize=3, label=name)
    axis.set(xlabel="optimizer steps", ylabel="AP50", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    return drawn


def figure(table: Table, numbers: str) -> Figure:
    """Scores and keys over the configurations' names, which are numbers; bars are standard deviations."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, measures in zip(drawn.subplots(1, 2), (("AP50", "AP"), ("keys",)), strict=True):
        for measure in measures:
            column = [(float(labels[0]), values[[*MEASURES].index(measure)]) for labels, values in table.rows]
            points = [(x, value.mean, value.deviation or 0.0) for x, value in column if value is not None]
            axis.errorbar(*(zip(*points, strict=True) if points else ([], [])), marker="o", capsize=3, label=measure)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set(xlabel=numbers, ylabel=" and ".join(measures))
        axis.grid(alpha=0.3)
        if len(measures) > 1:
            axis.legend()
    return drawn
