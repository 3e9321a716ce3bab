"""Attention painted over an image: one colour scale for a whole figure, its legend, and one tile.

Shapes: h×w features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance
from torch import Tensor

from detr_fabric.analysis.measures import NEAR_ZERO
from detr_fabric.draw import Color, clip

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable

TILE = 168  # longer side of a tile in pixels
OPACITY = 0.85  # of a weight's colour over the image
NEARLY_ZERO = "#2f6f9f"  # of weights below NEAR_ZERO, at half the opacity: a hue that the other colours don't have


def color_scale(largest: float) -> ScalarMappable:
    """The colours of weights from NEAR_ZERO to the largest one, which grow lighter with the weight's logarithm."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    colors = colormaps["inferno"].with_extremes(under=NEARLY_ZERO)
    return ScalarMappable(LogNorm(NEAR_ZERO, max(largest, 10 * NEAR_ZERO), clip=False), colors)


def heat(
    image: Image.Image, weights: Tensor, boxes: Sequence[tuple[Sequence[float], Color]], scale: ScalarMappable
) -> Image.Image:
    """A tile of the image under the colours of weights (h, w); boxes: xyxy in [0, 1] and their colours.

    Where a weight is exactly 0, the image shows, dimmed and pale. Cells keep their edges, because blurring would hide
    which weights are 0.
    """
    shrink = TILE / max(image.size)
    width, height = (max(1, round(side * shrink)) for side in image.size)
    resample = Image.Resampling.LANCZOS if shrink < 1 else Image.Resampling.NEAREST
    pale = ImageEnhance.Color(image.resize((width, height), resample)).enhance(0.4)
    dimmed = np.asarray(pale, np.float32) * 0.65
    values = weights.cpu().numpy()
    cells = scale.to_rgba(values)  # (h, w, 4), in [0, 1]
    cells[..., 3] = OPACITY * (values > 0) * np.where(values < NEAR_ZERO, 0.5, 1)
    enlarged = Image.fromarray((255 * cells).round().astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    color, opaque = np.split(np.asarray(enlarged, np.float32), [3], -1)
    tile = Image.fromarray((dimmed + (color - dimmed) * opaque / 255).round().astype(np.uint8))
    for box, line in boxes:
        scaled = [x * (side - 1) for x, side in zip(box, (width, height) * 2, strict=True)]
        if (place := clip(scaled, (width, height))) is not None:
            ImageDraw.Draw(tile).rectangle(place, outline=line, width=2)
    return tile


def scale_bar(scale: ScalarMappable, width: int = 420, height: int = 60) -> Image.Image:
    """The legend of the colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    bar = figure.colorbar(scale, cax=figure.subplots(), orientation="horizontal", extend="min", extendfrac=0.12)
    bar.set_label("attention weight", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
