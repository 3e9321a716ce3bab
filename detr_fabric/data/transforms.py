"""The original's augmentations on uint8 images and their boxes; all randomness comes from an explicit generator.

Images are (3, H, W) uint8, boxes (N, 4) float32 xyxy in pixels, labels (N,) int64.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Sample = tuple[Tensor, Tensor, Tensor]  # image, boxes, labels
Transform = Callable[[Tensor, Tensor, Tensor, random.Random], Sample]

CROP_SCALES = (400, 500, 600)  # shorter sides before a crop
CROP_SIDES = (384, 600)  # smallest and largest side of a crop
# The original sets no limit before a crop; this one only keeps a 1-pixel-high image from growing to gigabytes.
CROP_MAX_SIZE = 20_000


def train_transform(scales: tuple[int, ...], max_size: int, flip: float, crop: bool) -> Transform:
    """The original's training augmentation: flip, then resize to a random scale; with `crop` half of the images are
    first resized to 400, 500 or 600 and cropped to sides of 384 to 600 pixels."""
    return partial(_augment, scales=scales, max_size=max_size, flip=flip, crop=crop)


def eval_transform(scale: int, max_size: int) -> Transform:
    """Resize the shorter side to `scale`, the longer one to `max_size` at most; nothing random."""
    return partial(_resize_only, scale=scale, max_size=max_size)


def _augment(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    rng: random.Random,
    *,
    scales: tuple[int, ...],
    max_size: int,
    flip: float,
    crop: bool,
) -> Sample:
    if rng.random() < flip:
        image, boxes = hflip(image, boxes)
    if crop and rng.random() >= 0.5:
        image, boxes = resize(image, boxes, rng.choice(CROP_SCALES), CROP_MAX_SIZE)
        image, boxes, labels = crop_region(image, boxes, labels, random_region(image, rng))
    image, boxes = resize(image, boxes, rng.choice(scales), max_size)
    return image, boxes, labels


def _resize_only(
    image: Tensor, boxes: Tensor, labels: Tensor, rng: random.Random, *, scale: int, max_size: int
) -> Sample:
    image, boxes = resize(image, boxes, scale, max_size)
    return image, boxes, labels


def hflip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mirrors left and right."""
    width = image.shape[-1]
    mirrored = boxes[:, [2, 1, 0, 3]] * boxes.new_tensor([-1, 1, -1, 1]) + boxes.new_tensor([width, 0, width, 0])
    return image.flip(-1), mirrored


def resized_size(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """(height, width) after the original's rule: shorter side = size, longer side at most max_size, rounded down."""
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = max(1, round(max_size * short / long))
    if short == size:
        return height, width
    return (int(size * height / width), size) if width < height else (size, int(size * width / height))


def resize(image: Tensor, boxes: Tensor, size: int, max_size: int | None) -> tuple[Tensor, Tensor]:
    """Antialiased bilinear resize of the image, and of its boxes by the ratios of the sides."""
    height, width = image.shape[-2:]
    new_height, new_width = resized_size(height, width, size, max_size)
    if (new_height, new_width) == (height, width):
        return image, boxes
    pixels = image[None].contiguous(memory_format=torch.channels_last)  # as decoded; crops are faster so, too
    image = interpolate(pixels, (new_height, new_width), mode="bilinear", antialias=True)[0]
    x, y = new_width / width, new_height / height
    return image, boxes * boxes.new_tensor([x, y, x, y])


def random_region(image: Tensor, rng: random.Random) -> tuple[int, int, int, int]:
    """A random (top, left, height, width) with sides in CROP_SIDES, inside the image."""
    low, high = CROP_SIDES
    full_height, full_width = image.shape[-2:]
    width = rng.randint(min(low, full_width), min(full_width, high))
    height = rng.randint(min(low, full_height), min(full_height, high))
    return rng.randint(0, full_height - height), rng.randint(0, full_width - width), height, width


def crop_region(image: Tensor, boxes: Tensor, labels: Tensor, region: tuple[int, int, int, int]) -> Sample:
    """Cuts out (top, left, height, width), a view of the image; objects left without area are dropped."""
    top, left, height, width = region
    boxes = boxes - boxes.new_tensor([left, top, left, top])
    boxes = torch.minimum(boxes, boxes.new_tensor([width, height, width, height])).clamp(min=0)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return image[:, top : top + height, left : left + width], boxes[keep], labels[keep]
