"""Attention painted over an image: the colour scale and one tile.

Shapes: h×w features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance
from torch import Tensor

from detr_fabric.pictures import Color

# Nine colours of Matplotlib's inferno (Smith & van der Walt 2015), evenly spaced: perceived lightness rises evenly.
INFERNO: tuple[Color, ...] = (
    (0, 0, 4),
    (31, 12, 72),
    (85, 15, 109),
    (136, 34, 106),
    (186, 54, 85),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
)
TILE = 168  # longer side of a tile in pixels


@cache
def color_table() -> np.ndarray:
    """(256, 3) uint8: INFERNO interpolated."""
    places = np.linspace(0, len(INFERNO) - 1, 256)
    channels = [np.interp(places, range(len(INFERNO)), channel) for channel in zip(*INFERNO, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def heat(image: Image.Image, weights: Tensor, boxes: Sequence[tuple[Sequence[float], Color]]) -> Image.Image:
    """A tile of the image under weights (h, w), relative to their largest; boxes: xyxy in [0, 1] and their colours.

    Cells keep their edges, for blurring would hide which weights are 0: there the image shows, dimmed and pale.
    """
    scale = TILE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    resample = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    pale = ImageEnhance.Color(image.resize((width, height), resample)).enhance(0.4)
    dimmed = np.asarray(pale, np.float32) * 0.65
    relative = (weights / weights.max().clamp_min(1e-30)).cpu().numpy()
    # Small weights stay visible where they are laid thinly over the image.
    opacity = 0.92 * relative[..., None] ** 0.35
    cells = np.concatenate([color_table()[(relative * 255).round().astype(np.uint8)], 255 * opacity], -1)
    enlarged = Image.fromarray(cells.round().astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    color, opaque = np.split(np.asarray(enlarged, np.float32), [3], -1)
    tile = Image.fromarray((dimmed + (color - dimmed) * opaque / 255).round().astype(np.uint8))
    for box, line in boxes:
        left, top, right, bottom = (min(max(x, 0.0), 1.0) for x in box)
        place = (left * (width - 1), top * (height - 1), right * (width - 1), bottom * (height - 1))
        ImageDraw.Draw(tile).rectangle(place, outline=line, width=2)
    return tile


def scale_bar(width: int, height: int) -> Image.Image:
    """The colours from 0 to the largest weight."""
    row = color_table()[np.linspace(0, 255, width).round().astype(np.uint8)]
    return Image.fromarray(np.broadcast_to(row, (height, width, 3)).copy())
