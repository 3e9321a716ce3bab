"""The original's augmentations of uint8 images and their boxes.

A transform first draws a plan for an image of a given size, from an explicit generator; the plan then says the image's
new size and is applied to it. Images are (3, H, W) uint8, boxes (N, 4) float32 xyxy in pixels, labels (N,) int64.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import cv2
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from detr_fabric.data.batch import Size

CROP_SCALES = (400, 500, 600)  # shorter sides before a crop
CROP_SIDES = (384, 600)  # smallest and largest side of a crop
CROP_MAX_SIZE = 20_000  # the original has no limit here; this one keeps a 1-pixel-high image from growing to gigabytes

Region = tuple[int, int, int, int]  # top, left, height, width


class Plan(NamedTuple):
    """What happens to one image, with all random numbers drawn."""

    flip: bool
    crop: tuple[Size, Region] | None  # resize to this size, then cut out this region
    size: Size  # of the result

    def apply(self, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image, boxes and labels after the plan, except that the image's final resize to `size` is left to the caller,
        who can resize it directly into a batch."""
        if self.flip:
            image, boxes = hflip(image, boxes)
        if self.crop is not None:
            size, region = self.crop
            image, boxes = resize(image, size), resize_boxes(boxes, size_of(image), size)
            image, boxes, labels = crop_region(image, boxes, labels, region)
        return image, resize_boxes(boxes, size_of(image), self.size), labels


class Transform(Protocol):
    def plan(self, height: int, width: int, rng: random.Random) -> Plan:
        """The plan for an image of this size."""
        ...


@dataclass(frozen=True)
class TrainTransform:
    """The original's training augmentation: flip, then resize to a random scale; with `crop` half of the images are
    first resized to 400, 500 or 600 and cropped to sides of 384 to 600 pixels."""

    scales: tuple[int, ...]
    max_size: int
    flip: float
    crop: bool

    def plan(self, height: int, width: int, rng: random.Random) -> Plan:
        flip = rng.random() < self.flip
        crop = None
        if self.crop and rng.random() >= 0.5:
            before = resized_size(height, width, rng.choice(CROP_SCALES), CROP_MAX_SIZE)
            region = random_region(*before, rng)
            crop = before, region
            _, _, height, width = region
        return Plan(flip, crop, resized_size(height, width, rng.choice(self.scales), self.max_size))


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side to `scale`, the longer one to `max_size` at most; nothing random."""

    scale: int
    max_size: int

    def plan(self, height: int, width: int, rng: random.Random) -> Plan:
        return Plan(False, None, resized_size(height, width, self.scale, self.max_size))


def size_of(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def hflip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    width = image.shape[-1]
    mirrored = boxes[:, [2, 1, 0, 3]] * boxes.new_tensor([-1, 1, -1, 1]) + boxes.new_tensor([width, 0, width, 0])
    return image.flip(-1), mirrored


def resized_size(height: int, width: int, size: int, max_size: int | None) -> Size:
    """The original's rule: shorter side = size, or less where the longer one would exceed max_size; rounded down. The
    shorter side is rounded first, so a very flat image exceeds it: 2000 × 100 becomes 1340 × 67 at 1333."""
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = max(1, round(max_size * short / long))
    if short == size:
        return height, width
    return (int(size * height / width), size) if width < height else (size, int(size * width / height))


def resize(image: Tensor, size: Size, out: Tensor | None = None) -> Tensor:
    """Antialiased bilinear resize of (3, H, W) to (3, *size), into `out` if given (channels last in memory). An image
    that already has this size is returned as it is, or copied into `out`."""
    (height, width), (new_height, new_width) = size_of(image), size
    if (new_height, new_width) == (height, width):
        resized = image
    elif new_height >= height and new_width >= width:  # nothing shrinks, so antialiasing has nothing to do
        resized = torch.empty(*size, 3, dtype=torch.uint8).permute(2, 0, 1) if out is None else out
        cv2.setNumThreads(0)  # OpenCV's threads don't survive a fork: a worker would wait for them
        source, target = (x.permute(1, 2, 0).numpy() for x in (image, resized))
        result = cv2.resize(source, (new_width, new_height), dst=target, interpolation=cv2.INTER_LINEAR)
        assert result.ctypes.data == target.ctypes.data, "OpenCV did not write into the given memory"
        return resized
    else:
        pixels = image[None].contiguous(memory_format=torch.channels_last)  # copies only crops; faster so
        resized = interpolate(pixels, size, mode="bilinear", antialias=True)[0]
    return resized if out is None else out.copy_(resized)


def resize_boxes(boxes: Tensor, old: Size, new: Size) -> Tensor:
    """Boxes in an image of size `old` → in the same image resized to `new`."""
    x, y = new[1] / old[1], new[0] / old[0]
    return boxes * boxes.new_tensor([x, y, x, y])


def random_region(full_height: int, full_width: int, rng: random.Random) -> Region:
    """A random region with sides in CROP_SIDES, inside an image of the given size."""
    low, high = CROP_SIDES
    width = rng.randint(min(low, full_width), min(full_width, high))
    height = rng.randint(min(low, full_height), min(full_height, high))
    return rng.randint(0, full_height - height), rng.randint(0, full_width - width), height, width


def crop_region(image: Tensor, boxes: Tensor, labels: Tensor, region: Region) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts out a region as a view of the image; objects left without area are dropped."""
    top, left, height, width = region
    boxes = boxes - boxes.new_tensor([left, top, left, top])
    boxes = torch.minimum(boxes, boxes.new_tensor([width, height, width, height])).clamp(min=0)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return image[:, top : top + height, left : left + width], boxes[keep], labels[keep]
