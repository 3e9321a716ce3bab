"""What travels from the loader to the model and the loss.

B images in a batch, H x W pixels with padding, h x w without; N objects in an image.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = tuple[int, int]
"""(height, width) in pixels."""


class ImageBatch(NamedTuple):
    """Images of different sizes, padded on the right and at the bottom."""

    images: Tensor  # (B, 3, H, W) uint8 RGB from the loader; float32 after normalize
    mask: Tensor  # (B, H, W) bool, True on padding


class Target(NamedTuple):
    """The objects of one image."""

    labels: Tensor  # (N,) int64, contiguous class ids
    boxes: Tensor  # (N, 4) float32, cxcywh in [0, 1] of the transformed image
    image_id: int | str  # the data set's own id
    orig_size: Size  # of the file
    size: Size  # after the transforms, without padding
    read_error: str | None = None  # why its file could not be read, if it was skipped; see CocoDetection


MicroBatch = tuple[ImageBatch, list[Target]]
"""A batch of images and the objects of each."""


def pad_images(images: list[Tensor], multiple: int = 1) -> ImageBatch:
    """Collates (3, h, w) images into one batch, zero-padded to the largest height and width."""
    # Decoded and resized images are channels last in memory; into a batch of that layout they are copied in one go.
    layout = torch.channels_last if images[0].stride(0) == 1 else torch.contiguous_format
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    batch, views = allocate_batch(sizes, multiple, images[0].dtype, layout)
    for image, view in zip(images, views, strict=True):
        view.copy_(image)
    return batch


def padded_size(sizes: Iterable[Size], multiple: int = 1) -> Size:
    """The size to which these images are padded together; both sides are multiples of `multiple`."""
    height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*sizes, strict=True))
    return height, width


def allocate_batch(
    sizes: list[Size],
    multiple: int = 1,
    dtype: torch.dtype = torch.uint8,
    layout: torch.memory_format = torch.channels_last,
) -> tuple[ImageBatch, list[Tensor]]:
    """A batch in which only the padding is written yet, and for each image the (3, h, w) view that it must fill."""
    height, width = padded_size(sizes, multiple)
    batch = torch.empty(len(sizes), 3, height, width, dtype=dtype, memory_format=layout)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    views = []
    for (h, w), pixels, padding in zip(sizes, batch, mask, strict=True):
        pixels[:, h:], pixels[:, :h, w:] = 0, 0
        padding[h:], padding[:h, w:] = True, True
        views.append(pixels[:, :h, :w])
    return ImageBatch(batch, mask), views


def normalize(batch: ImageBatch) -> ImageBatch:
    """uint8 RGB → float32 normalised by ImageNet's statistics, zero on padding (the original normalises, then pads)."""
    mean, std = _statistics(batch.images.device)
    images = batch.images.float().contiguous(memory_format=torch.channels_last).div_(255).sub_(mean).div_(std)
    return ImageBatch(images.masked_fill_(batch.mask[:, None], 0.0), batch.mask)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation, (3, 1, 1). Cached, because copying them to the device synchronises."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std
