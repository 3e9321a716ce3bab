"""Figures of attention: one model's layers and heads for chosen queries, or several models' for the same objects.

Shapes: h×w features. Every figure has one colour scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from detr_fabric.analysis.heatmaps import color_scale, heat, scale_bar
from detr_fabric.analysis.maps import AttentionMaps
from detr_fabric.analysis.measures import NEAR_ZERO
from detr_fabric.draw import BLACK, NO_CHARACTER, WHITE, Boxes, Color, Picture, draw, font

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable

GREY: Color = (110, 110, 110)
PREDICTED: Color = (90, 230, 255)  # a hue that the colours of weights don't have
GROUND_TRUTH: Color = WHITE
DETECTED = 0.5  # smallest score of a detection that is drawn
PICTURE = 512  # longer side of a picture with detections, about, in pixels
LEGEND = [
    "Pictures on the left: detections (solid) and ground truth (dashed).",
    "Tiles have no colour where a weight is exactly 0, and are bluish where it is below 1e-6.",
    "Below a tile: its largest weight, and its share of weights that are 0 (below 1e-6, if none is 0).",
    "All tiles share this scale:",
]


class Tile(NamedTuple):
    """Attention weights over an image, with the box of the query and, where given, of the ground truth."""

    maps: AttentionMaps
    query: int
    weights: Tensor  # (h, w)
    ground_truth: list[float] | None = None  # xyxy in [0, 1]


class Table(NamedTuple):
    """Rows of tiles with their names; None leaves a place empty."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Tile | None]]]


def query_figure(maps: AttentionMaps, queries: Sequence[int], title: str) -> Image.Image:
    """The detections of one model, and its cross-attention: for each query a row a layer, the heads side by side."""
    lines = [
        f"Cross-attention of {len(queries)} queries of {maps.model}: a row for each decoder layer,",
        "the mean over heads, then head by head. Cyan: the box that the query predicts.",
    ]
    columns = ["mean", *(f"head {head}" for head in range(maps.cross.shape[1]))]
    tables = []
    for query in queries:
        rows: list[tuple[str, list[Tile | None]]] = []
        for number, layer in enumerate(maps.cross[:, :, query]):  # (H, h, w)
            rows.append((f"layer {number}", [Tile(maps, query, weights) for weights in (layer.mean(0), *layer)]))
        tables.append(Table(_name(maps, query), columns, rows))
    return _figure(title, [(detections(maps), maps)], lines, tables)


def detection_figure(maps: AttentionMaps, queries: Sequence[int], title: str) -> Image.Image:
    """The detections in one image, and for each a row of its query's cross-attention: of every layer the mean over
    heads, then the heads of the last layer."""
    lines = [
        "Below, a row for each detection: what its query read of the image (cross-attention),",
        "in every decoder layer as the mean over heads, then in the heads of the last layer.",
        "Cyan: the box that the query predicts.",
    ]
    rows = [(_name(maps, query), _means_and_heads(maps, query, len(maps.cross))) for query in queries]
    table = Table("", _columns(*maps.cross.shape[:2]), rows)
    return _figure(title, [(detections(maps, queries), maps)], lines, [table])


def comparison_figure(models: Sequence[AttentionMaps], objects: Sequence[int], title: str) -> Image.Image:
    """Several models on one image: for each object of the ground truth a row a model, with the attention of the query
    matched to it: of every layer the mean over heads, then the heads of the last layer."""
    lines = [
        "Cross-attention of the queries matched to the same object: of every decoder layer the mean over heads,",
        "then the heads of the last layer. Cyan: the box that the query predicts; white: the ground truth.",
    ]
    layers, heads = (max(maps.cross.shape[axis] for maps in models) for axis in (0, 1))
    tables = []
    for number in objects:
        rows = []
        for maps in (maps for maps in models if number in maps.matched):
            query = maps.matched[number]
            tiles = _means_and_heads(maps, query, layers, maps.gt_boxes[number].tolist())
            rows.append((f"{maps.model}\n{maps.mapping}\n{_name(maps, query)}", tiles))
        if rows:
            label = models[0].class_names[int(models[0].gt_labels[number])]
            tables.append(Table(f"object {number}: {label}", _columns(layers, heads), rows))
    return _figure(title, [(detections(maps), maps) for maps in models], lines, tables)


def detections(maps: AttentionMaps, queries: Sequence[int] | None = None) -> Image.Image:
    """The image with its ground truth, and the detections of some queries; None: all that score above DETECTED."""
    height, width = maps.image.shape[-2:]
    scale = min(1.0, PICTURE / max(height, width))  # `draw` enlarges small images itself
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    image = interpolate(maps.image[None], size, mode="bilinear", antialias=True)[0] if scale < 1 else maps.image
    corners = torch.tensor([size[1], size[0]]).repeat(2)
    kept = maps.scores > DETECTED if queries is None else torch.tensor(queries, dtype=torch.int64)
    predicted = Boxes(maps.boxes[kept] * corners, maps.labels[kept], maps.scores[kept])
    ground_truth = Boxes(maps.gt_boxes * corners, maps.gt_labels)
    return draw(Picture(image, maps.model, predicted, ground_truth), maps.class_names, PICTURE)


def _columns(layers: int, heads: int) -> list[str]:
    return [*(f"layer {number}" for number in range(layers)), *(f"last, head {head}" for head in range(heads))]


def _means_and_heads(
    maps: AttentionMaps, query: int, layers: int, ground_truth: list[float] | None = None
) -> list[Tile | None]:
    """Of each layer the mean over heads, places left empty up to `layers`, then the heads of the last layer."""
    attention = maps.cross[:, :, query]  # (L, H, h, w)
    means, heads = ([Tile(maps, query, w, ground_truth) for w in each] for each in (attention.mean(1), attention[-1]))
    return [*means, *[None] * (layers - len(means)), *heads]


def _name(maps: AttentionMaps, query: int) -> str:
    return f"query {query}: {maps.class_names[int(maps.labels[query])]} {maps.scores[query]:.2f}"


def _figure(
    title: str,
    pictures: Sequence[tuple[Image.Image, AttentionMaps]],
    lines: Sequence[str],
    tables: Sequence[Table],
) -> Image.Image:
    """A title, pictures above the names of their models, the explanation with the colour scale, and the tables."""
    tiles = [tile for table in tables for _, row in table.rows for tile in row if tile is not None]
    scale = color_scale(max((float(tile.weights.max()) for tile in tiles), default=1.0))
    explained = _grid([[_text("\n".join([*lines, *LEGEND]), 16)], [scale_bar(scale)]], across=0)
    drawn = [_grid([[picture], [_text(f"{maps.model}, {maps.mapping}", 16)]]) for picture, maps in pictures]
    parts = [_text(title, 24), _grid([[*drawn, explained]], gap=20, down=0)]
    for table in tables:
        heads = [_text(name, 15) for name in ("", *table.columns)]
        rows: list[list[Image.Image | None]] = [
            [_text(name, 15, "right"), *(tile and _tile(tile, scale) for tile in row)] for name, row in table.rows
        ]
        parts += [_text(table.title, 18)] if table.title else []
        parts.append(_grid([heads, *rows]))
    return _grid([[part] for part in parts], gap=20, across=0)


def _tile(tile: Tile, scale: ScalarMappable) -> Image.Image:
    image = Image.fromarray(tile.maps.image.permute(1, 2, 0).contiguous().numpy())
    boxes = [] if tile.ground_truth is None else [(tile.ground_truth, GROUND_TRUTH)]
    boxes.append((tile.maps.boxes[tile.query].tolist(), PREDICTED))
    zero, near = ((tile.weights <= limit).float().mean() for limit in (0, NEAR_ZERO))
    share = f"{zero:.1%} zero" if zero > 0 else f"{near:.1%} < 1e-6"
    return _grid([[heat(image, tile.weights, boxes, scale)], [_text(f"max {tile.weights.max():.2f}, {share}", 12)]])


def _text(text: str, size: int, align: str = "left") -> Image.Image:
    """Black lines on white."""
    text = "\n".join(NO_CHARACTER.sub("?", line) for line in text.split("\n"))
    face, pen = font(text, size), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    _, _, width, height = pen.multiline_textbbox((0, 0), text or " ", face, spacing=6)
    image = Image.new("RGB", (round(width) + 1, round(height) + 3), WHITE)
    ImageDraw.Draw(image).multiline_text((0, 0), text, BLACK, face, spacing=6, align=align)
    return image


def _grid(
    cells: Sequence[Sequence[Image.Image | None]], gap: int = 6, across: float = 0.5, down: float = 0.5
) -> Image.Image:
    """Images in rows and columns, each as large as its largest image; across, down: 0 left or top, 0.5 middle."""
    widths = [max(cell.width if cell else 0 for cell in column) for column in zip_longest(*cells)]
    heights = [max(cell.height if cell else 0 for cell in row) for row in cells]
    size = (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(heights) + 1))
    sheet = Image.new("RGB", size, WHITE)
    for number, row in enumerate(cells):
        for column, cell in enumerate(row):
            if cell is not None:
                x = sum(widths[:column]) + gap * (column + 1) + round(across * (widths[column] - cell.width))
                y = sum(heights[:number]) + gap * (number + 1) + round(down * (heights[number] - cell.height))
                sheet.paste(cell, (x, y))
    return sheet
