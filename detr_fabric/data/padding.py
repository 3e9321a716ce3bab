"""Pixels of batches: how many are padding, which images to put together, and how a batch is kept under a limit.

A shape is the (height, width) of an image after its transform; (0, 0) where it is not known before reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Shape = tuple[int, int]


def likeness(shape: Shape) -> tuple[float, int]:
    """What to sort by so that neighbours share their shape: proportions by half octaves, then area; unknown ones first.
    Proportions alone leave twice the padding, for training draws the scale of each image anew."""
    height, width = shape
    return (round(2 * math.log2(width / height)), height * width) if height and width else (-math.inf, 0)


def padded_shape(shapes: Iterable[Shape], multiple: int = 1) -> Shape:
    """(height, width) to which these images are padded together; both multiples of `multiple`."""
    heights, widths = zip(*shapes, strict=True)
    return math.ceil(max(heights) / multiple) * multiple, math.ceil(max(widths) / multiple) * multiple


def pixels(shapes: Sequence[Shape], multiple: int = 1) -> int:
    """Pixels of the padded batch, padding included."""
    return len(shapes) * math.prod(padded_shape(shapes, multiple))


def passes(shapes: Sequence[Shape], max_pixels: int | None, multiple: int = 1) -> list[list[int]]:
    """Positions of a batch's images, divided so that no part is padded to more than `max_pixels`: as it is where it
    fits, else like shapes together, in as few parts as a greedy cut finds. An image alone is never divided."""
    everything = list(range(len(shapes)))
    if max_pixels is None or pixels(shapes, multiple) <= max_pixels:
        return [everything]
    parts: list[list[int]] = []
    for position in sorted(everything, key=lambda position: likeness(shapes[position])):
        if parts and pixels([shapes[p] for p in (*parts[-1], position)], multiple) <= max_pixels:
            parts[-1].append(position)
        else:
            parts.append([position])
    return parts


class Padding(NamedTuple):
    """What is lost to padding."""

    share: float  # of all pixels
    divided: float  # part of the batches that takes several passes


def padding_of(batches: Sequence[Sequence[Shape]], max_pixels: int | None = None, multiple: int = 1) -> Padding:
    """Of batches of these images, divided as `passes` does. Nothing is lost to no batches."""
    divisions = [passes(shapes, max_pixels, multiple) for shapes in batches]
    parts = [
        [shapes[p] for p in part] for shapes, division in zip(batches, divisions, strict=True) for part in division
    ]
    used = sum(height * width for shapes in batches for height, width in shapes)
    total = sum(pixels(part, multiple) for part in parts)
    divided = sum(len(division) > 1 for division in divisions)
    return Padding(1 - used / max(1, total), divided / max(1, len(batches)))
