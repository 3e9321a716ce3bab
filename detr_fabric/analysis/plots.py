"""The measures layer by layer in one chart: a row a measure, a column a site, a colour a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from detr_fabric.analysis.capture import SITES, Site
from detr_fabric.analysis.statistics import AttentionStatistics
from detr_fabric.draw import font_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which colour-blind readers can tell apart too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#787878"

SITE_TITLES: dict[Site, str] = {
    "encoder_self": "encoder self-attention",
    "decoder_self": "decoder self-attention",
    "decoder_cross": "decoder cross-attention",
}
MEASURE_TITLES = {
    "zeros": "share of weights\nthat are 0",
    "support": "keys that a query\nattends to",
    "entropy": "entropy of a query\n(nats)",
    "gini": "Gini index\nof the map",
    "alpha": "learned alpha",
    "paibb": "attention inside\nthe box (PAIBB)",
}
SHARES = ("zeros", "gini", "paibb")  # measures from 0 to 1


def overview(models: Sequence[tuple[str, AttentionStatistics]]) -> Figure:
    """All measures of all models by layer: means over heads as lines, single heads as dots."""
    from matplotlib.figure import Figure

    # Alpha only where one is learned; PAIBB always, because the legend stands in the places beside it.
    heads = [head for _, statistics in models for head in statistics.heads]
    measures = [m for m in MEASURE_TITLES if m == "paibb" or any(getattr(head, m) is not None for head in heads)]
    figure = Figure(figsize=(4.2 * len(SITES), 2.4 * len(measures)), layout="constrained")
    axes = figure.subplots(len(measures), len(SITES), squeeze=False)
    for row, measure in zip(axes, measures, strict=True):
        for column, (axis, site) in enumerate(zip(row, SITES, strict=True)):
            if not plot(axis, models, site, measure):
                axis.axis("off")
            axis.set_ylabel(MEASURE_TITLES[measure] if column == 0 or measure == "paibb" else "")
    for axis, site in zip(axes[0], SITES, strict=True):
        axis.set_title(SITE_TITLES[site])
    _legend(axes[-1, 0], [name for name, _ in models])
    return figure


def plot(axis: Axes, models: Sequence[tuple[str, AttentionStatistics]], site: Site, measure: str) -> bool:
    """One measure of one site; False where no model has it."""
    layers = 0
    for number, (_, statistics) in enumerate(models):
        color = COLORS[number % len(COLORS)]
        by_layer = values_by_layer(statistics, site, measure)
        layers = max(layers, len(by_layer))
        for layer, values in enumerate(by_layer):
            axis.plot([layer] * len(values), values, ".", color=color, alpha=0.4)
        axis.plot([sum(values) / len(values) for values in by_layer], "o-", color=color)
        if measure == "zeros":
            near = values_by_layer(statistics, site, "near_zeros")
            axis.plot([sum(values) / len(values) for values in near], "o--", color=color, markersize=4)
        if measure == "paibb" and by_layer and statistics.box_area is not None:
            axis.axhline(statistics.box_area, color=GREY, linestyle="--")
    axis.set_xticks(range(layers), [f"layer {layer}" for layer in range(layers)])
    axis.margins(y=0.08)
    axis.set_ylim(*((-0.04, 1.04) if measure in SHARES else (0, None)))
    axis.grid(axis="y", alpha=0.3)
    return layers > 0


def values_by_layer(statistics: AttentionStatistics, site: Site, measure: str) -> list[list[float]]:
    """By layer, the values of its heads; empty where the site has no layer or the measure does not apply."""
    layers: dict[int, list[float]] = {}
    for head in statistics.heads:
        if head.site == site and (value := getattr(head, measure)) is not None:
            layers.setdefault(head.layer, []).append(value)
    return list(layers.values())


def _legend(axis: Axes, names: Sequence[str]) -> None:
    """Which colour is which model, and what lines and dots mean."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.lines import Line2D

    entries = [
        *(Line2D([], [], color=COLORS[n % len(COLORS)], marker="o", label=name) for n, name in enumerate(names)),
        Line2D([], [], color=GREY, linestyle="", marker=".", label="one head; lines are means over heads"),
        Line2D(
            [], [], color=GREY, linestyle="--", marker="o", markersize=4, label="first row: weights of at most 1e-6"
        ),
        Line2D([], [], color=GREY, linestyle="--", label="PAIBB: of even attention, the box's share of the image"),
    ]
    file = font_file("".join(names))
    font = FontProperties(fname=file) if file else None
    legend = axis.legend(handles=entries, loc="upper left", frameon=False, prop=font)
    legend.set_in_layout(False)  # it may reach into the empty place beside it
