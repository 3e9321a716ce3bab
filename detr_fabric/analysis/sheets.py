"""Sheets of attention: one model's layers and heads for chosen queries, or several models' for the same objects.

Shapes: H×W image, h×w features, L decoder layers, H heads, Q queries, N true objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from detr_fabric.analysis.heatmaps import heat, scale_bar
from detr_fabric.analysis.measures import NEAR_ZERO
from detr_fabric.pictures import BLACK, WHITE, Boxes, Color, Picture, draw

GREY: Color = (110, 110, 110)
PREDICTED: Color = (90, 230, 255)  # a hue that the colours of weights don't have
TRUE: Color = WHITE
MARGIN = 20
DETECTED = 0.5  # smallest score of a detection that is drawn
PICTURE = 512  # longer side of a picture with detections, about, in pixels

Tile = tuple[Image.Image, str]  # and its caption


class Look(NamedTuple):
    """What one model made of one image."""

    model: str  # its name
    mapping: str  # its mappings
    image: Tensor  # (3, H, W) uint8 RGB
    scores: Tensor  # (Q,) of the best class that is an object
    labels: Tensor  # (Q,)
    boxes: Tensor  # (Q, 4) predicted, xyxy in [0, 1]
    cross: Tensor  # (L, H, Q, h, w) cross-attention, without padding
    true_labels: Tensor  # (N,)
    true_boxes: Tensor  # (N, 4) xyxy in [0, 1]
    matched: dict[int, int]  # true object → the query matched to it; not all, if there are more objects than queries
    class_names: Sequence[str]


def query_sheet(look: Look, queries: Sequence[int], title: str) -> Image.Image:
    """The detections of one model, and its cross-attention: for each query a row a layer, the heads side by side."""
    heads = look.cross.shape[1]
    lines = [
        f"Cross-attention of {len(queries)} queries of {look.model}: a row for each decoder layer,",
        "the mean over heads, then head by head. Cyan: the box that the query predicts.",
        *_legend(),
    ]
    parts = [_header(title, [(detections(look), _caption(look))], lines)]
    for query in queries:
        rows = [
            [_tile(look, maps, query) for maps in (layer[:, query].mean(0), *layer[:, query])] for layer in look.cross
        ]
        names = [f"layer {number}" for number in range(len(rows))]
        parts.append(_titled(_name(look, query), _table(rows, names, ["mean", *(f"head {h}" for h in range(heads))])))
    return _stack(parts)


def detection_sheet(look: Look, queries: Sequence[int], title: str) -> Image.Image:
    """What a model found in one image, and for each detection a row of its query's cross-attention: of every layer the
    mean over heads, then the heads of the last layer."""
    layers, heads = look.cross.shape[:2]
    lines = [
        "Below, a row for each detection: what its query read of the image (cross-attention),",
        "in every decoder layer as the mean over heads, then in the heads of the last layer.",
        "Cyan: the box that the query predicts.",
        *_legend(),
    ]
    rows = [
        [_tile(look, maps, query) for maps in (*look.cross[:, :, query].mean(1), *look.cross[-1, :, query])]
        for query in queries
    ]
    columns = [*(f"layer {number}" for number in range(layers)), *(f"last, head {head}" for head in range(heads))]
    found = detections(look, queries)
    return _stack(
        [_header(title, [(found, _caption(look))], lines), _table(rows, [_name(look, q) for q in queries], columns)]
    )


def comparison_sheet(looks: Sequence[Look], objects: Sequence[int], title: str) -> Image.Image:
    """Several models on one image: for each true object a row a model, with the attention of the query matched to it:
    of every layer the mean over heads, then the heads of the last layer."""
    layers, heads = (max(look.cross.shape[axis] for look in looks) for axis in (0, 1))
    lines = [
        "Cross-attention of the queries matched to the same object: of every decoder layer the mean over heads,",
        "then the heads of the last layer. Cyan: the box that the query predicts; white: the true box.",
        *_legend(),
    ]
    parts = [_header(title, [(detections(look), _caption(look)) for look in looks], lines)]
    columns = [*(f"layer {number}" for number in range(layers)), *(f"last, head {head}" for head in range(heads))]
    for number in objects:
        rows: list[list[Tile | None]] = []
        names = []
        for look in (look for look in looks if number in look.matched):
            query = look.matched[number]
            true = look.true_boxes[number].tolist()
            means = [_tile(look, maps, query, true) for maps in look.cross[:, :, query].mean(1)]
            single = [_tile(look, maps, query, true) for maps in look.cross[-1, :, query]]
            rows.append([*means, *[None] * (layers - len(means)), *single])
            names.append(f"{look.model}\n{look.mapping}\n{_name(look, query)}")
        if rows:
            label = looks[0].class_names[int(looks[0].true_labels[number])]
            parts.append(_titled(f"object {number}: {label}", _table(rows, names, columns)))
    return _stack(parts)


def detections(look: Look, queries: Sequence[int] | None = None) -> Image.Image:
    """The image with what some queries found, None: all with a score above DETECTED, and the true boxes dashed."""
    height, width = look.image.shape[-2:]
    scale = min(1.0, PICTURE / max(height, width))  # `draw` enlarges small images itself
    size = (round(height * scale), round(width * scale))
    image = interpolate(look.image[None], size, mode="bilinear", antialias=True)[0] if scale < 1 else look.image
    corners = torch.tensor([size[1], size[0]]).repeat(2)
    kept = look.scores > DETECTED if queries is None else torch.tensor(queries, dtype=torch.int64)
    predicted = Boxes(look.boxes[kept] * corners, look.labels[kept], look.scores[kept])
    true = Boxes(look.true_boxes * corners, look.true_labels)
    return draw(Picture(image, look.model, predicted, true), look.class_names, PICTURE)


def _caption(look: Look) -> str:
    return f"{look.model}, {look.mapping}"


def _name(look: Look, query: int) -> str:
    return f"query {query}: {look.class_names[int(look.labels[query])]} {look.scores[query]:.2f}"


def _tile(look: Look, weights: Tensor, query: int, true: list[float] | None = None) -> Tile:
    """weights (h, w) over the image, with the query's box and a true one."""
    image = Image.fromarray(look.image.permute(1, 2, 0).contiguous().numpy())
    share = (weights < NEAR_ZERO).float().mean()
    boxes = [(true, TRUE)] if true is not None else []
    boxes.append((look.boxes[query].tolist(), PREDICTED))
    return heat(image, weights, boxes), f"max {weights.max():.2f}, {share:.0%} zero"


def _legend() -> list[str]:
    return [
        "Each tile is scaled to its own largest weight, written below it with the part",
        "of weights below 1e-6. A weight of 0 leaves the image as it is, dimmed.",
    ]


def _table(rows: Sequence[Sequence[Tile | None]], row_names: Sequence[str], column_names: Sequence[str]) -> Image.Image:
    """Tiles above their captions, with names to the left and on top; None stays empty."""
    small, normal = ImageFont.load_default(size=12), ImageFont.load_default(size=15)
    gap, caption, head = 6, 20, 24
    present = [tile for row in rows for tile in row if tile is not None]
    width = max(image.width for image, _ in present) + gap
    height = max(image.height for image, _ in present) + caption + gap
    sheet = Image.new("RGB", (1, 1), WHITE)
    left = round(max(ImageDraw.Draw(sheet).multiline_textbbox((0, 0), n, normal)[2] for n in row_names)) + 2 * gap
    sheet = sheet.resize((left + width * len(column_names), head + height * len(rows)))
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(column_names):
        pen.text((left + column * width + (width - gap) / 2, head / 2), name, BLACK, normal, "mm")
    for line, (name, row) in enumerate(zip(row_names, rows, strict=True)):
        top = head + line * height
        pen.multiline_text(
            (left - 2 * gap, top + (height - caption - gap) / 2), name, BLACK, normal, "rm", align="right"
        )
        for column, tile in enumerate(row):
            if tile is not None:
                image, text = tile
                sheet.paste(image, (left + column * width, top))
                middle = left + column * width + (width - gap) / 2
                pen.text((middle, top + image.height + 3), text, GREY, small, "ma")
    return sheet


def _header(title: str, pictures: Sequence[Tile], lines: Sequence[str]) -> Image.Image:
    """A title, pictures side by side above their captions, and the explanation with the colour scale."""
    large, normal = ImageFont.load_default(size=24), ImageFont.load_default(size=16)
    top, line, bar = 44, 24, (256, 16)
    across = sum(image.width + MARGIN for image, _ in pictures)
    tall = max(image.height for image, _ in pictures)
    text = round(max(normal.getlength(each) for each in lines))
    sheet = Image.new("RGB", (across + text, top + max(tall + line, (len(lines) + 2) * line)), WHITE)
    pen = ImageDraw.Draw(sheet)
    pen.text((0, 0), title, BLACK, large)
    left = 0
    for image, caption in pictures:
        sheet.paste(image, (left, top))
        pen.text((left + image.width / 2, top + image.height + 4), caption, BLACK, normal, "ma")
        left += image.width + MARGIN
    for number, each in enumerate(lines):
        pen.text((left, top + number * line), each, BLACK, normal)
    below = top + len(lines) * line + line // 2
    pen.text((left, below), "0", BLACK, normal)
    sheet.paste(scale_bar(*bar), (left + 18, below + 2))
    pen.text((left + 18 + bar[0] + 8, below), "largest weight of the tile", BLACK, normal)
    return sheet


def _titled(title: str, sheet: Image.Image) -> Image.Image:
    font = ImageFont.load_default(size=18)
    titled = Image.new("RGB", (max(sheet.width, round(font.getlength(title))), sheet.height + 30), WHITE)
    ImageDraw.Draw(titled).text((0, 0), title, BLACK, font)
    titled.paste(sheet, (0, 30))
    return titled


def _stack(parts: Sequence[Image.Image]) -> Image.Image:
    width = max(part.width for part in parts) + 2 * MARGIN
    sheet = Image.new("RGB", (width, sum(part.height + MARGIN for part in parts) + MARGIN), WHITE)
    top = MARGIN
    for part in parts:
        sheet.paste(part, (MARGIN, top))
        top += part.height + MARGIN
    return sheet
