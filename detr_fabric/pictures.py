"""Detections drawn on images: predicted boxes solid, with name and score, true ones dashed; and grids of pictures."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the picture

BLACK, WHITE = (0, 0, 0), (255, 255, 255)


class Boxes(NamedTuple):
    """Objects of one image; true ones have no scores."""

    boxes: Tensor  # (N, 4) xyxy in pixels of the image
    labels: Tensor  # (N,) int64, contiguous class ids
    scores: Tensor | None = None  # (N,) in [0, 1]


class Picture(NamedTuple):
    """One image with what a model found in it and what is there."""

    image: Tensor  # (3, H, W) uint8 RGB
    caption: str
    predicted: Boxes | None = None
    true: Boxes | None = None
    missed: Boxes | None = None  # true ones that are named, black on white


def class_color(label: int) -> Color:
    """The colour of a class, the same in every picture: hues a golden angle apart, so neighbours differ."""
    hue = label * (math.sqrt(5) - 1) / 2 % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9 - 0.25 * (label // 3 % 2), 1.0 - 0.2 * (label // 2 % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(picture: Picture, class_names: Sequence[str], side: int = 512) -> Image.Image:
    """Paints the boxes on the image; a small one is first enlarged by a whole factor, to a longer side of about `side`.

    Lines and text grow with the picture. Labels stay inside it and out of each other's way where there is room; the
    surest detection is drawn last and labelled first. True boxes are dashed in black and white.
    """
    canvas = Image.fromarray(picture.image.permute(1, 2, 0).contiguous().numpy())
    factor = max(1, round(side / max(canvas.size)))
    canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    shorter, longer = sorted(canvas.size)
    line = max(2, round(min(longer / 220, shorter / 30)))
    font = ImageFont.load_default(size=max(13, min(longer / 42, shorter / 6)))
    taken: list[Rectangle] = []
    if (predicted := picture.predicted) is not None:
        certainty = [1.0] * len(predicted.boxes) if predicted.scores is None else predicted.scores.tolist()
        order = sorted(range(len(certainty)), key=certainty.__getitem__)
        places = [_inside((predicted.boxes[k] * factor).tolist(), canvas.size) for k in range(len(certainty))]
        for k in order:
            pen.rectangle(places[k], outline=class_color(int(predicted.labels[k])), width=line)
    if picture.true is not None:
        for box in picture.true.boxes:
            _dashed(pen, _inside((box * factor).tolist(), canvas.size), line)
    if predicted is not None:
        for k in reversed(order):
            label = int(predicted.labels[k])
            text = class_names[label] if predicted.scores is None else f"{class_names[label]} {certainty[k]:.2f}"
            taken.append(_label(pen, text, places[k], class_color(label), font, canvas.size, taken))
    if picture.missed is not None:
        for box, label in zip(picture.missed.boxes, picture.missed.labels.tolist(), strict=True):
            place = _inside((box * factor).tolist(), canvas.size)
            taken.append(_label(pen, class_names[label], place, WHITE, font, canvas.size, taken))
    return canvas


def grid(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 4, cell: int = 512) -> Image.Image:
    """Pictures in rows of `columns`, each scaled to a longer side of `cell` pixels and above its caption."""
    columns = min(columns, len(pictures))
    margin, text = cell // 32, cell // 24
    scales = [cell / max(picture.size) for picture in pictures]
    scaled = [p.resize((round(p.width * s), round(p.height * s))) for p, s in zip(pictures, scales, strict=True)]
    rows = [scaled[k : k + columns] for k in range(0, len(scaled), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    width = max(picture.width for picture in scaled) + margin
    sheet = Image.new("RGB", (columns * width + margin, sum(heights) + len(rows) * (2 * text + margin)), WHITE)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=text)
    top = margin
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for column, picture in enumerate(row):
            middle = margin + column * width + (width - margin) // 2
            sheet.paste(picture, (middle - picture.width // 2, top + (height - picture.height) // 2))
            caption = captions[number * columns + column]
            pen.text((middle, top + height + text // 4), caption, font=font, fill=BLACK, anchor="ma")
        top += height + 2 * text + margin
    return sheet


def _inside(box: list[float], size: tuple[int, int]) -> Rectangle:
    """A box clipped to the picture, at least a pixel large."""
    left, right = (min(max(x, 0), size[0] - 1) for x in (box[0], box[2]))
    top, bottom = (min(max(y, 0), size[1] - 1) for y in (box[1], box[3]))
    return left, top, max(left, right), max(top, bottom)


def _dashed(pen: ImageDraw.ImageDraw, place: Rectangle, line: int) -> None:
    """A rectangle of white dashes on black, visible on every background and on a solid box in the same place."""
    left, top, right, bottom = place
    thin, dash = max(1, line // 2), 4 * line
    pen.rectangle(place, outline=BLACK, width=thin)
    for start in range(round(left), round(right), 2 * dash):
        for y in (top, bottom - thin + 1):
            pen.rectangle((start, y, min(start + dash, right), y + thin - 1), fill=WHITE)
    for start in range(round(top), round(bottom), 2 * dash):
        for x in (left, right - thin + 1):
            pen.rectangle((x, start, x + thin - 1, min(start + dash, bottom)), fill=WHITE)


def _label(
    pen: ImageDraw.ImageDraw,
    text: str,
    place: Rectangle,
    color: Color,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
    taken: list[Rectangle],
) -> Rectangle:
    """Writes a text on its colour at a corner of its box; returns where, inside the picture."""
    left, top, right, bottom = place
    x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
    pad = max(2, (y1 - y0) / 6)
    width, height = x1 - x0 + 2 * pad, y1 - y0 + 2 * pad
    corners = [(left, top - height), (left, top), (right - width, top), (left, bottom), (left, bottom - height)]
    corners += [(right - width, top - height), (right - width, bottom), (right, top), (left - width, top)]
    inside = ((max(0.0, min(x, size[0] - width)), max(0.0, min(y, size[1] - height))) for x, y in corners)
    spots = [(x, y, x + width, y + height) for x, y in inside]
    spot = min(spots, key=lambda s: sum(_overlap(s, t) for t in taken))  # the first of equals
    pen.rectangle(spot, fill=color)
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140
    pen.text((spot[0] + pad - x0, spot[1] + pad - y0), text, font=font, fill=WHITE if dark else BLACK)
    return spot


def _overlap(a: Rectangle, b: Rectangle) -> float:
    """The area that two rectangles share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
