"""The measures layer by layer in one figure: a row a measure, a column a site, a colour a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from detr_fabric.analysis.capture import SITES, Site
from detr_fabric.analysis.statistics import AttentionStatistics
from detr_fabric.pictures import BLACK, WHITE, Color

# Okabe & Ito's colours, told apart also by colour-blind readers.
COLORS: tuple[Color, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
)
GREY: Color = (120, 120, 120)
FAINT: Color = (225, 225, 225)
FINE = 2  # drawn this much larger, then reduced: Pillow's lines have no antialiasing
WIDTH, HEIGHT = 420, 250  # of a panel
LEFT, TOP, RIGHT, BOTTOM = 58, 40, 20, 46  # from a panel's edges to its axes

SITE_TITLES: dict[Site, str] = {
    "encoder_self": "encoder self-attention",
    "decoder_self": "decoder self-attention",
    "decoder_cross": "decoder cross-attention",
}
MEASURE_TITLES = {
    "zeros": "part of weights that are 0",
    "support": "keys that a query attends to",
    "entropy": "entropy of a query, nats",
    "gini": "Gini index of the map",
    "alpha": "learned alpha",
    "paibb": "part inside the true box",
}


class Line(NamedTuple):
    """A value for each layer, from 0, and those of its heads, shown as dots."""

    color: Color
    values: list[float]
    heads: list[list[float]]
    dashed: bool = False


def overview(models: Sequence[tuple[str, AttentionStatistics]]) -> Image.Image:
    """All measures of all models by layer: means over heads as lines, heads as dots."""
    # Alpha only where one is learned; PAIBB always, for beside its single panel is room for the key.
    heads = [head for _, statistics in models for head in statistics.heads]
    measures = [m for m in MEASURE_TITLES if m == "paibb" or any(getattr(head, m) is not None for head in heads)]
    sheet = Image.new("RGB", (len(SITES) * WIDTH, len(measures) * HEIGHT), WHITE)
    for row, measure in enumerate(measures):
        for column, site in enumerate(SITES):
            lines = []
            for number, (_, statistics) in enumerate(models):
                color = COLORS[number % len(COLORS)]
                lines += _lines(statistics, site, measure, color)
                if measure == "zeros":
                    lines += [line._replace(dashed=True) for line in _lines(statistics, site, "near_zeros", color)]
                if measure == "paibb" and lines and statistics.box_area is not None:
                    lines.append(Line(GREY, [statistics.box_area] * len(lines[-1].values), [], dashed=True))
            if lines:
                title = f"{SITE_TITLES[site]}: {MEASURE_TITLES[measure]}"
                sheet.paste(panel(title, lines), (column * WIDTH, row * HEIGHT))
    sheet.paste(_key([name for name, _ in models]), (0, (len(measures) - 1) * HEIGHT))
    return sheet


def panel(title: str, lines: Sequence[Line]) -> Image.Image:
    """Lines over layers, on axes from 0 to 1, or further where a value is larger."""
    canvas = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), WHITE)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13 * FINE)
    layers = max(len(line.values) for line in lines)
    largest = max([1.0, *(v for line in lines for v in line.values), *(v for x in lines for h in x.heads for v in h)])
    step = tick_step(largest)
    top = math.ceil(largest / step - 1e-9) * step
    right, bottom = (WIDTH - RIGHT) * FINE, (HEIGHT - BOTTOM) * FINE

    def place(layer: float, value: float) -> tuple[float, float]:
        across = (layer + 0.5) / layers
        return LEFT * FINE + across * (right - LEFT * FINE), bottom - value / top * (bottom - TOP * FINE)

    for tick in range(round(top / step) + 1):
        y = place(0, tick * step)[1]
        pen.line((LEFT * FINE, y, right, y), GREY if tick == 0 else FAINT, FINE)
        pen.text(((LEFT - 8) * FINE, y), f"{tick * step:g}", BLACK, font, "rm")
    for layer in range(layers):
        pen.text((place(layer, 0)[0], bottom + 6 * FINE), f"layer {layer}", BLACK, font, "ma")
    pen.text((LEFT * FINE, 10 * FINE), title, BLACK, ImageFont.load_default(size=14 * FINE))
    for line in lines:
        for layer, heads in enumerate(line.heads):
            if not line.dashed:
                for value in heads:
                    _dot(pen, place(layer, value), 2 * FINE, _pale(line.color))
    for line in lines:
        points = [place(layer, value) for layer, value in enumerate(line.values)]
        for start, end in zip(points, points[1:], strict=False):
            _stroke(pen, start, end, line.color, line.dashed)
        for point in points:
            _dot(pen, point, (3 if line.dashed else 4) * FINE, line.color)
    return canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def tick_step(largest: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that needs five steps at most to reach `largest`."""
    power = 10.0 ** math.floor(math.log10(largest / 5))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if 5 * factor * power >= largest * (1 - 1e-9))


def _lines(statistics: AttentionStatistics, site: Site, measure: str, color: Color) -> list[Line]:
    """The measure of a site's layers; no line where the site has no layer or the measure does not apply."""
    layers: dict[int, list[float]] = {}
    for head in statistics.heads:
        value = getattr(head, measure)
        if head.site == site and value is not None:
            layers.setdefault(head.layer, []).append(value)
    return [Line(color, [sum(h) / len(h) for h in layers.values()], list(layers.values()))] if layers else []


def _key(names: Sequence[str]) -> Image.Image:
    """Which colour is which model, and what strokes and dots mean."""
    canvas = Image.new("RGB", (2 * WIDTH * FINE, HEIGHT * FINE), WHITE)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14 * FINE)
    entries: list[tuple[str, Color, bool]] = [
        *((name, COLORS[number % len(COLORS)], False) for number, name in enumerate(names)),
        (
            "first row: below 1e-6 instead of exactly 0; true box: its part of the image, the score of even attention",
            GREY,
            True,
        ),
    ]
    for number, (text, color, dashed) in enumerate(entries):
        y = (TOP + 26 * number) * FINE
        start, end = (LEFT * FINE, y), ((LEFT + 44) * FINE, y)
        _stroke(pen, start, end, color, dashed)
        pen.text(((LEFT + 56) * FINE, y), text, BLACK, font, "lm")
    y = (TOP + 26 * len(entries)) * FINE
    _dot(pen, ((LEFT + 22) * FINE, y), 2 * FINE, GREY)
    pen.text(((LEFT + 56) * FINE, y), "one head; lines are means over heads", BLACK, font, "lm")
    return canvas.resize((2 * WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _stroke(
    pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], color: Color, dashed: bool
) -> None:
    if not dashed:
        pen.line((*start, *end), color, 2 * FINE)
        return
    length, dash = math.dist(start, end), 5 * FINE
    for number in range(0, math.ceil(length / dash), 2):
        a, b = (min(k * dash / length, 1.0) for k in (number, number + 1))
        ends = ((start[0] + t * (end[0] - start[0]), start[1] + t * (end[1] - start[1])) for t in (a, b))
        pen.line([x for point in ends for x in point], color, 2 * FINE)


def _dot(pen: ImageDraw.ImageDraw, at: tuple[float, float], radius: float, color: Color) -> None:
    pen.ellipse((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius), fill=color)


def _pale(color: Color) -> Color:
    red, green, blue = (channel + (255 - channel) * 55 // 100 for channel in color)
    return red, green, blue
