"""The original's augmentations on uint8 images and their boxes; all randomness comes from an explicit generator.

Images are (3, H, W) uint8, boxes (N, 4) float32 xyxy in pixels, labels (N,) int64.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Sample = tuple[Tensor, Tensor, Tensor]  # image, boxes, labels

CROP_SCALES = (400, 500, 600)  # shorter sides before a crop
CROP_SIDES = (384, 600)  # smallest and largest side of a crop
# The original sets no limit before a crop; this one only keeps a 1-pixel-high image from growing to gigabytes.
CROP_MAX_SIZE = 20_000


class Transform(Protocol):
    """What is done to every image."""

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor, rng: random.Random) -> Sample: ...

    def size(self, height: int, width: int, rng: random.Random) -> tuple[int, int]:
        """(height, width) that an image of this size gets with a generator in the same state."""
        ...


@dataclass(frozen=True)
class TrainTransform:
    """The original's training augmentation: flip, then resize to a random scale; with `crop` half of the images are
    first resized to 400, 500 or 600 and cropped to sides of 384 to 600 pixels."""

    scales: tuple[int, ...]
    max_size: int
    flip: float
    crop: bool

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor, rng: random.Random) -> Sample:
        if rng.random() < self.flip:
            image, boxes = hflip(image, boxes)
        if self.crop and rng.random() >= 0.5:
            image, boxes = resize(image, boxes, rng.choice(CROP_SCALES), CROP_MAX_SIZE)
            height, width = image.shape[-2:]
            image, boxes, labels = crop_region(image, boxes, labels, random_region(height, width, rng))
        image, boxes = resize(image, boxes, rng.choice(self.scales), self.max_size)
        return image, boxes, labels

    def size(self, height: int, width: int, rng: random.Random) -> tuple[int, int]:
        """As in Transform: the same draws in the same order as when it is called."""
        rng.random()
        if self.crop and rng.random() >= 0.5:
            height, width = resized_size(height, width, rng.choice(CROP_SCALES), CROP_MAX_SIZE)
            _, _, height, width = random_region(height, width, rng)
        return resized_size(height, width, rng.choice(self.scales), self.max_size)


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side to `scale`, the longer one to `max_size` at most; nothing random."""

    scale: int
    max_size: int

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor, rng: random.Random) -> Sample:
        image, boxes = resize(image, boxes, self.scale, self.max_size)
        return image, boxes, labels

    def size(self, height: int, width: int, rng: random.Random) -> tuple[int, int]:
        """As in Transform."""
        return resized_size(height, width, self.scale, self.max_size)


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


def random_region(full_height: int, full_width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """A random (top, left, height, width) with sides in CROP_SIDES, inside an image of that size."""
    low, high = CROP_SIDES
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
