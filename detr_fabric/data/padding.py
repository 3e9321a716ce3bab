"""Padding of batches: how much of a batch it takes, which images to put together, and how to keep a batch small.

Sizes are those after the transform, (0, 0) if unknown before reading the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from detr_fabric.data.batch import Size, padded_size


def bucket_key(size: Size) -> tuple[float, int]:
    """Sort by this key to make images of similar shape neighbours: first aspect ratio in half octaves, then area;
    unknown sizes come first. Aspect ratio alone leaves twice the padding, because training draws each image's scale."""
    height, width = size
    return (round(2 * math.log2(width / height)), height * width) if height and width else (-math.inf, 0)


def pixels(sizes: Sequence[Size], multiple: int = 1) -> int:
    """Pixels of the padded batch, padding included."""
    return len(sizes) * math.prod(padded_size(sizes, multiple))


def split_batch(sizes: Sequence[Size], max_pixels: int | None, multiple: int = 1) -> list[list[int]]:
    """Positions of a batch's images, divided so that no part has more than `max_pixels` with padding.

    A batch that fits stays whole. Otherwise similar shapes go together, in as few parts as a greedy cut finds. A single
    image is a part of its own whatever its size.
    """
    everything = list(range(len(sizes)))
    if max_pixels is None or pixels(sizes, multiple) <= max_pixels:
        return [everything]
    parts: list[list[int]] = []
    for position in sorted(everything, key=lambda position: bucket_key(sizes[position])):
        if parts and pixels([sizes[p] for p in (*parts[-1], position)], multiple) <= max_pixels:
            parts[-1].append(position)
        else:
            parts.append([position])
    return parts


class PaddingShare(NamedTuple):
    """How much of a set of batches is padding."""

    share: float  # of all pixels
    split: float  # share of the batches that split_batch divides


def padding_of(batches: Sequence[Sequence[Size]], max_pixels: int | None = None, multiple: int = 1) -> PaddingShare:
    """The padding of batches of images of these sizes, each divided by split_batch."""
    splits = [split_batch(sizes, max_pixels, multiple) for sizes in batches]
    parts = [[sizes[p] for p in part] for sizes, split in zip(batches, splits, strict=True) for part in split]
    used = sum(height * width for sizes in batches for height, width in sizes)
    total = sum(pixels(part, multiple) for part in parts)
    divided = sum(len(split) > 1 for split in splits)
    return PaddingShare(1 - used / max(1, total), divided / max(1, len(batches)))
