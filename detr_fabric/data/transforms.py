"""The original's augmentations on uint8 images and their boxes; all randomness comes from an explicit generator.

Images are (3, H, W) uint8, boxes (N, 4) float32 xyxy in pixels, labels (N,) int64.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import cv2
import torch
from torch import Tensor
from torch.nn.functional import interpolate

Sample = tuple[Tensor, Tensor, Tensor]  # image, boxes, labels
Size = tuple[int, int]  # height, width

CROP_SCALES = (400, 500, 600)  # shorter sides before a crop
CROP_SIDES = (384, 600)  # smallest and largest side of a crop
# The original sets no limit before a crop; this one only keeps a 1-pixel-high image from growing to gigabytes.
CROP_MAX_SIZE = 20_000


class Transform(Protocol):
    """What is done to every image up to its last resize, which writes straight into the batch."""

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor, rng: random.Random) -> tuple[Sample, Size]:
        """The image that is to be resized to this size, and boxes and labels as they are then."""
        ...

    def size(self, height: int, width: int, rng: random.Random) -> Size:
        """The size that an image of this one gets with a generator in the same state."""
        ...


@dataclass(frozen=True)
class TrainTransform:
    """The original's training augmentation: flip, then resize to a random scale; with `crop` half of the images are
    first resized to 400, 500 or 600 and cropped to sides of 384 to 600 pixels."""

    scales: tuple[int, ...]
    max_size: int
    flip: float
    crop: bool

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor, rng: random.Random) -> tuple[Sample, Size]:
        """As in Transform."""
        if rng.random() < self.flip:
            image, boxes = hflip(image, boxes)
        if self.crop and rng.random() >= 0.5:
            size = resized_size(*size_of(image), rng.choice(CROP_SCALES), CROP_MAX_SIZE)
            image, boxes = resize(image, size), resize_boxes(boxes, size_of(image), size)
            image, boxes, labels = crop_region(image, boxes, labels, random_region(*size, rng))
        size = resized_size(*size_of(image), rng.choice(self.scales), self.max_size)
        return (image, resize_boxes(boxes, size_of(image), size), labels), size

    def size(self, height: int, width: int, rng: random.Random) -> Size:
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

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor, rng: random.Random) -> tuple[Sample, Size]:
        """As in Transform."""
        size = self.size(*size_of(image), rng)
        return (image, resize_boxes(boxes, size_of(image), size), labels), size

    def size(self, height: int, width: int, rng: random.Random) -> Size:
        """As in Transform."""
        return resized_size(height, width, self.scale, self.max_size)


def size_of(image: Tensor) -> Size:
    """(height, width) of a (3, H, W) image."""
    return image.shape[-2], image.shape[-1]


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


def resize(image: Tensor, size: Size, out: Tensor | None = None) -> Tensor:
    """Antialiased bilinear resize of (3, H, W) to (3, *size), into `out` where that is given, which has its channels
    last in memory. An image that has the size already is returned as it is, or copied."""
    (height, width), (new_height, new_width) = size_of(image), size
    if (new_height, new_width) == (height, width):
        resized = image
    elif new_height >= height and new_width >= width:  # nothing shrinks, so there is nothing to smooth
        resized = torch.empty(*size, 3, dtype=torch.uint8).permute(2, 0, 1) if out is None else out
        cv2.setNumThreads(0)  # its threads would be missed, and waited for, in a forked process
        source, target = (x.permute(1, 2, 0).numpy() for x in (image, resized))
        result = cv2.resize(source, (new_width, new_height), dst=target, interpolation=cv2.INTER_LINEAR)
        assert result.ctypes.data == target.ctypes.data, "written elsewhere"
        return resized
    else:
        pixels = image[None].contiguous(memory_format=torch.channels_last)  # as decoded; crops are faster so, too
        resized = interpolate(pixels, size, mode="bilinear", antialias=True)[0]
    return resized if out is None else out.copy_(resized)


def resize_boxes(boxes: Tensor, old: Size, new: Size) -> Tensor:
    """Boxes of an image of the old size in one of the new, by the ratios of the sides."""
    x, y = new[1] / old[1], new[0] / old[0]
    return boxes * boxes.new_tensor([x, y, x, y])


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
