"""Boxes on images: detections solid with name and score, ground truth dashed; and pictures in a grid with a legend."""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:  # the data check, which needs the fonts, starts without torch
    from torch import Tensor

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the picture
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
LEGEND = "solid: detection with its score    dashed: ground truth"
NO_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and halves of surrogate pairs


class Boxes(NamedTuple):
    """Objects of one image; those of the ground truth have no scores."""

    boxes: Tensor  # (N, 4) xyxy in pixels of the image
    labels: Tensor  # (N,) int64, contiguous class ids
    scores: Tensor | None = None  # (N,) in [0, 1]


class Picture(NamedTuple):
    """An image with a model's detections and its ground truth."""

    image: Tensor  # (3, H, W) uint8 RGB
    caption: str
    predicted: Boxes | None = None
    ground_truth: Boxes | None = None
    missed: Boxes | None = None  # objects of the ground truth that are labelled, black on white


def class_color(label: int) -> Color:
    """The colour of a class, the same in every picture: hues a golden angle apart, so neighbours differ."""
    hue = label * (math.sqrt(5) - 1) / 2 % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9 - 0.25 * (label // 3 % 2), 1.0 - 0.2 * (label // 2 % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


# ---- text in any script


def legible(names: Sequence[str], ids: Sequence[object]) -> list[str]:
    """The names of classes, with "class <id>" in place of each that no font of this machine can write."""
    return [name if name.isascii() or font_file(name) else f"class {id_}" for name, id_ in zip(names, ids, strict=True)]


def font(text: str, size: float) -> Font:
    """A font that can write the text; where none has all its characters, Pillow's own."""
    file = None if text.isascii() else font_file(text)
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


@lru_cache(maxsize=1024)
def font_file(text: str) -> str | None:
    """DejaVu Sans, else the first of the system's fonts that has every character of the text; None: no font has."""
    needed = {ord(character) for character in text if not character.isspace()}
    return next((file for file in _font_files() if needed <= _characters(file)), None)


@cache
def _font_files() -> list[str]:
    import matplotlib  # which comes with DejaVu Sans, and knows where systems keep their fonts
    from matplotlib.font_manager import findSystemFonts

    system = (file for file in sorted(findSystemFonts()) if "lastresort" not in file.lower().replace(" ", ""))
    return [f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", *system]


@cache
def _characters(file: str) -> frozenset[int]:
    """The code points that a font has; none if it can't be read or has only bitmaps of fixed sizes."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(file)
        return frozenset(face.get_charmap()) if face.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()


# ---- one picture


def draw(picture: Picture, class_names: Sequence[str], side: int = 512, most: int | None = None) -> Image.Image:
    """Draws the boxes on the image; a small one is first enlarged by a whole factor, to a longer side of about `side`.
    Of many detections only the first `most` by score are labelled.

    Lines and text grow with the picture. Lines lie around their boxes. Labels stay inside the picture, out of each
    other's way and off the objects where there is room; those that can't fit are left out, and so are boxes whose
    coordinates aren't finite. Detections are drawn by ascending score and labelled by descending score.
    """
    canvas = Image.fromarray(picture.image.permute(1, 2, 0).contiguous().numpy())
    factor = max(1, round(side / max(canvas.size)))
    canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    shorter, longer = sorted(canvas.size)
    line = max(2, round(min(longer / 220, shorter / 30)))
    found, there, missed = (
        _placed(boxes, class_names, factor, canvas.size)
        for boxes in (picture.predicted, picture.ground_truth, picture.missed)
    )
    for place, _, color in reversed(found):
        pen.rectangle(_around(place, line, canvas.size), outline=color, width=line)
    for place, _, _ in there:
        _dashed(pen, _around(place, max(1, line // 2), canvas.size), line)
    objects = [place for place, _, _ in found + there]
    taken: list[Rectangle] = []
    labels = [*found[:most], *((place, name, WHITE) for place, name, _ in missed)]
    for place, text, color in labels:
        size = max(13.0, min(longer / 42, shorter / 6))
        if (spot := _label(pen, text, place, color, size, canvas.size, taken, objects)) is not None:
            taken.append(spot)
    return canvas


def _placed(
    found: Boxes | None, class_names: Sequence[str], factor: int, size: tuple[int, int]
) -> list[tuple[Rectangle, str, Color]]:
    """Where each box lies in the picture, with its text and colour, by descending score."""
    if found is None:
        return []
    scores = [1.0] * len(found.labels) if found.scores is None else found.scores.tolist()
    placed = []
    for number in sorted(range(len(scores)), key=lambda number: -scores[number]):
        label = int(found.labels[number])
        if (place := clip([factor * x for x in found.boxes[number].tolist()], size)) is not None:
            name = class_names[label] if 0 <= label < len(class_names) else f"class {label}"
            text = NO_CHARACTER.sub("?", name if found.scores is None else f"{name} {scores[number]:.2f}")
            placed.append((place, text, class_color(label)))
    return placed


def clip(box: Sequence[float], size: tuple[int, int]) -> Rectangle | None:
    """A box xyxy inside a picture of that width and height; None if its coordinates aren't finite."""
    if not all(map(math.isfinite, box)):
        return None
    left, right = (min(max(x, 0), size[0] - 1) for x in (box[0], box[2]))
    top, bottom = (min(max(y, 0), size[1] - 1) for y in (box[1], box[3]))
    return left, top, max(left, right), max(top, bottom)


def _around(place: Rectangle, line: int, size: tuple[int, int]) -> Rectangle:
    """The place with a line's width around it, as far as the picture reaches: the line must not hide a small object."""
    left, top, right, bottom = place
    out = line - 1
    return max(0, left - out), max(0, top - out), min(size[0] - 1, right + out), min(size[1] - 1, bottom + out)


def _dashed(pen: ImageDraw.ImageDraw, place: Rectangle, line: int) -> None:
    """A rectangle of white dashes on black, visible on every background and on a solid box in the same place."""
    left, top, right, bottom = box = tuple(map(round, place))
    thin, dash = max(1, line // 2), 4 * line
    pen.rectangle(box, outline=BLACK, width=thin)
    for start in range(left, right, 2 * dash):
        for y in (top, bottom - thin + 1):
            pen.rectangle((start, y, min(start + dash, right), y + thin - 1), fill=WHITE)
    for start in range(top, bottom, 2 * dash):
        for x in (left, right - thin + 1):
            pen.rectangle((x, start, x + thin - 1, min(start + dash, bottom)), fill=WHITE)


def _label(
    pen: ImageDraw.ImageDraw,
    text: str,
    place: Rectangle,
    color: Color,
    text_size: float,
    size: tuple[int, int],
    taken: Sequence[Rectangle],
    objects: Sequence[Rectangle],
) -> Rectangle | None:
    """Writes a text on its colour beside its box; returns where, inside the picture, or None if it can't fit there.

    The spot is the one that hides least: of other labels first, then of its own box, then of other boxes.
    """
    face = font(text, text_size)
    pad = max(2, text_size / 8)
    while text and pen.textlength(text, face) + 2 * pad > size[0]:
        text = text[:-2] + "…" if len(text) > 2 else ""
        face = font(text, text_size)
    x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=face)
    width, height = x1 - x0 + 2 * pad, y1 - y0 + 2 * pad
    if not text or width > size[0] or height > size[1]:
        return None
    left, top, right, bottom = place
    corners = [(left, top - height), (left, bottom), (right - width, top - height), (right - width, bottom)]
    corners += [(right, top), (left - width, top), (right, bottom - height), (left - width, bottom - height)]
    corners += [(left, top), (right - width, top), (left, bottom - height), (right - width, bottom - height)]
    inside = ((max(0.0, min(x, size[0] - width)), max(0.0, min(y, size[1] - height))) for x, y in corners)

    def hidden(spot: Rectangle) -> float:
        others = sum(_overlap(spot, each) for each in objects) / max(1, len(objects))
        return 8 * sum(_overlap(spot, label) for label in taken) + 2 * _overlap(spot, place) + others

    spot = min(((x, y, x + width, y + height) for x, y in inside), key=hidden)  # the first of equals
    pen.rectangle(spot, fill=color)
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140
    pen.text((spot[0] + pad - x0, spot[1] + pad - y0), text, font=face, fill=WHITE if dark else BLACK)
    return spot


def _overlap(a: Rectangle, b: Rectangle) -> float:
    """The area that two rectangles share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


# ---- several pictures


def grid(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int = 4,
    cell: int = 512,
    legend: str = LEGEND,
) -> Image.Image:
    """Pictures in rows of `columns`, each scaled to a longer side of `cell` pixels and above its caption."""
    columns = min(columns, len(pictures))
    margin, text = cell // 32, cell // 24
    scales = [cell / max(picture.size) for picture in pictures]
    scaled = [
        picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        for picture, scale in zip(pictures, scales, strict=True)
    ]
    rows = [scaled[k : k + columns] for k in range(0, len(scaled), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    captions = [NO_CHARACTER.sub("?", caption) for caption in captions]
    lengths = [ImageDraw.Draw(scaled[0]).textlength(each, font(each, text)) for each in (legend, *captions)]
    width = math.ceil(max(*(picture.width for picture in scaled), *lengths[1:], lengths[0] / columns)) + margin
    top = 2 * margin + text
    sheet = Image.new("RGB", (columns * width + margin, top + sum(heights) + len(rows) * (2 * text + margin)), WHITE)
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, margin), legend, font=font(legend, text), fill=BLACK)
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for column, picture in enumerate(row):
            middle = margin + column * width + (width - margin) // 2
            sheet.paste(picture, (middle - picture.width // 2, top + height - picture.height))
            caption = captions[number * columns + column]
            pen.text((middle, top + height + text // 4), caption, font=font(caption, text), fill=BLACK, anchor="ma")
        top += height + 2 * text + margin
    return sheet
