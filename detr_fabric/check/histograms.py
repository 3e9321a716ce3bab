"""What a data set holds, in one chart: classes, sizes of objects, objects per image, sizes of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from detr_fabric.analysis.plots import COLORS, GREY
from detr_fabric.check.statistics import LARGE, SMALL
from detr_fabric.data.formats.annotations import Annotations
from detr_fabric.data.summary import image_of_object, objects_per_image
from detr_fabric.draw import NO_CHARACTER, font_file
from detr_fabric.terminal import noun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASSES = 30  # that are named, those with the most objects
LETTERS = 24  # of a class's name
UNKNOWN = "unknown: the annotations\ndo not say it"
BLUE, RED = COLORS[0], COLORS[1]


def histograms(data: Annotations, queries: int, title: str) -> Figure:
    """The chart; queries: the most objects that a model can find in an image. Crowds are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.8), layout="constrained")
    figure.suptitle(f"{title}: {len(data):,} images, {(~data.crowd).sum():,} objects", fontsize=13)
    grid = figure.add_gridspec(2, 3, width_ratios=(1.15, 1, 1))
    classes(figure.add_subplot(grid[:, 0]), data)
    sides(figure.add_subplot(grid[0, 1]), data)
    shapes(figure.add_subplot(grid[0, 2]), data)
    per_image(figure.add_subplot(grid[1, 1]), data, queries)
    images(figure.add_subplot(grid[1, 2]), data)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    return figure


def classes(axis: Axes, data: Annotations) -> None:
    """Objects of each class, most first."""
    from matplotlib.font_manager import FontProperties

    counts = np.bincount(data.labels[~data.crowd], minlength=data.categories.num_classes)
    labels = sorted(data.categories.labels.values(), key=lambda label: -counts[label])
    named, names = labels[:CLASSES], data.categories.legible_names()
    axis.barh(range(len(named)), counts[named], color=BLUE)
    most = max(1, counts.max(initial=0))
    for row, label in enumerate(named):
        axis.text(counts[label] + most / 100, row, f"{counts[label]:,}", va="center", fontsize=8, color=GREY)
    axis.set_yticks(range(len(named)), [NO_CHARACTER.sub("?", shortened(names[label])) for label in named], fontsize=9)
    for text in axis.get_yticklabels():
        text.set_parse_math(False)  # what stands between two dollars is no formula
        if (file := font_file(text.get_text())) is not None and not text.get_text().isascii():
            text.set_fontproperties(FontProperties(fname=file, size=9))
    axis.set_ylim(max(len(named), 12) - 0.4, -0.6)
    axis.set_xlim(0, most * 1.12)
    axis.grid(axis="x", alpha=0.3)
    none = int((counts[labels] == 0).sum())
    said = f": the {len(named)} with most objects" if len(named) < len(labels) else ""
    axis.set_title(
        f"{len(labels):,} {noun('class', len(labels))}{said}" + (f", {none} have none" if none else ""), fontsize=11
    )


def sides(axis: Axes, data: Annotations) -> None:
    """The side of a square of each object's area, with COCO's limits."""
    from matplotlib.ticker import MaxNLocator

    areas = data.areas[~data.crowd]
    axis.set_title("size of objects: √area in pixels of the file", fontsize=11)
    if not len(areas):
        return note(axis, "no objects")
    values = np.sqrt(areas.clip(1))
    low, high = np.floor(np.log2(values.min())), np.ceil(np.log2(values.max() + 1))
    axis.hist(values, bins=np.logspace(low, high, 41, base=2).tolist(), color=BLUE)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks := [2.0**k for k in range(int(low), int(high) + 1)], [f"{tick:g}" for tick in ticks])
    axis.set_xlim(2**low, 2**high)
    top = axis.get_ylim()[1] * 1.14
    axis.set_ylim(0, top)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    small, large = (areas < SMALL).mean(), (areas >= LARGE).mean()
    limits = (2**low, SMALL**0.5, LARGE**0.5, 2**high)
    shares = {"small": small, "medium": 1 - small - large, "large": large}
    for left, right, (name, share) in zip(limits[:-1], limits[1:], shares.items(), strict=True):
        left, right = max(left, 2**low), min(right, 2**high)
        if left < right:
            axis.text((left * right) ** 0.5, top * 0.98, f"{name}\n{share:.0%}", ha="center", va="top", fontsize=8)
    for limit in limits[1:3]:
        if 2**low < limit < 2**high:
            axis.axvline(limit, color=RED, linestyle="--", linewidth=1)
    axis.grid(axis="y", alpha=0.3)


def shapes(axis: Axes, data: Annotations) -> None:
    """Widths and heights of boxes as parts of their images'."""
    from matplotlib.colors import LogNorm

    axis.set_title("box: part of the image's width and height", fontsize=11)
    usable = ~data.crowd
    if not usable.any():
        return note(axis, "no objects")
    of_images = data.sizes[image_of_object(data)[usable]][:, ::-1]  # width, height
    known = (of_images > 0).all(1)
    if not known.any():
        return note(axis, UNKNOWN)
    parts = (data.boxes[usable][known, 2:] / of_images[known]).clip(0, 1)
    axis.hist2d(parts[:, 0], parts[:, 1], bins=40, range=[[0, 1], [0, 1]], cmap="Blues", norm=LogNorm(vmin=0.2))
    axis.set_xlabel("width")
    axis.set_ylabel("height")
    axis.set_aspect("equal")


def per_image(axis: Axes, data: Annotations, queries: int) -> None:
    """Images by how many objects they have, and the number of queries, above which no model can find all."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    counts = objects_per_image(data)
    most, above = int(counts.max(initial=0)), int((counts > queries).sum())
    right = max(most, queries)
    width = -(-(right + 1) // 100)
    images, *_ = axis.hist(counts, bins=np.arange(-0.5, right + 1.5 + width, width).tolist(), color=BLUE)
    if np.max(images) > 30:  # else a few images with many objects could not be seen
        axis.set_yscale("log")
        axis.set_ylim(0.7, None)
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.axvline(queries + 0.5, color=RED, linestyle="--", linewidth=1)
    left = queries < right / 2  # of the text, where there is more room
    text, align = (f"  {queries} queries", "left") if left else (f"{queries} queries  ", "right")
    axis.text(queries + 0.5, 0.98, text, transform=axis.get_xaxis_transform(), ha=align, va="top", color=RED)
    said = f"{above:,} images have more than {queries}" if above else f"at most {most}"
    axis.set_title(f"objects per image: {said}", fontsize=11)
    axis.set_ylabel("images")
    axis.grid(axis="y", alpha=0.3)


def images(axis: Axes, data: Annotations) -> None:
    """Widths and heights of the images."""
    axis.set_title("size of images", fontsize=11)
    sizes = data.sizes[(data.sizes > 0).all(1)]
    if not len(sizes):
        return note(axis, UNKNOWN)
    distinct, times = np.unique(sizes, axis=0, return_counts=True)
    areas = 16 + 284 * times / times.max()
    axis.scatter(distinct[:, 1], distinct[:, 0], s=areas, color=BLUE, alpha=0.35, linewidths=0)
    height, width = distinct[times.argmax()]
    axis.set_title(f"size of images, most often {width} x {height} ({times.max() / len(data):.0%})", fontsize=11)
    axis.set_xlabel("width in pixels")
    axis.set_ylabel("height in pixels")
    limit = 1.08 * sizes.max()
    axis.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    axis.grid(alpha=0.3)


def note(axis: Axes, text: str) -> None:
    """Says in the place of a chart why there is none."""
    axis.text(0.5, 0.5, text, ha="center", transform=axis.transAxes, color=GREY)


def shortened(name: str) -> str:
    """The start of a long name of a class."""
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"
