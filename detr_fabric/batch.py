"""What travels from the loader to the model and the loss."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageBatch(NamedTuple):
    """Images of different sizes, padded to the right and below."""

    images: Tensor  # (B, 3, H, W) uint8 RGB from the loader; float32 after normalize
    mask: Tensor  # (B, H, W) bool, True on padding


class Target(NamedTuple):
    """The objects of one image."""

    labels: Tensor  # (N,) int64, contiguous class ids
    boxes: Tensor  # (N, 4) float32, cxcywh in [0, 1] of the transformed image
    image_id: int | str  # the data set's own id
    orig_size: tuple[int, int]  # (height, width) of the file
    size: tuple[int, int]  # (height, width) after the transforms, without padding
    fault: str | None = None  # why its file could not be read, if it was skipped; see CocoDetection


def pad_images(images: list[Tensor], multiple: int = 1) -> ImageBatch:
    """Collates (3, h, w) images into one batch, zero-padded to the largest height and width."""
    # Decoded and resized images have their channels last; the batch too then, or each pixel is copied by itself.
    layout = torch.channels_last if images[0].stride(0) == 1 else torch.contiguous_format
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    batch, places = padding_for(sizes, multiple, images[0].dtype, layout)
    for image, place in zip(images, places, strict=True):
        place.copy_(image)
    return batch


def padding_for(
    sizes: list[tuple[int, int]],
    multiple: int = 1,
    dtype: torch.dtype = torch.uint8,
    layout: torch.memory_format = torch.channels_last,
) -> tuple[ImageBatch, list[Tensor]]:
    """A batch for images of these (height, width), of which nothing but the padding is there, and a view of the place
    (3, height, width) that each of them has to fill."""
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
    batch = torch.empty(len(sizes), 3, height, width, dtype=dtype, memory_format=layout)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    places = []
    for (h, w), pixels, padding in zip(sizes, batch, mask, strict=True):
        pixels[:, h:], pixels[:, :h, w:] = 0, 0
        padding[h:], padding[:h, w:] = True, True
        places.append(pixels[:, :h, :w])
    return ImageBatch(batch, mask), places


def normalize(batch: ImageBatch) -> ImageBatch:
    """uint8 RGB → float32 normalised by ImageNet's statistics; zero on padding: the original normalises, then pads."""
    mean, std = _statistics(batch.images.device)
    images = batch.images.float().contiguous(memory_format=torch.channels_last).div_(255).sub_(mean).div_(std)
    return ImageBatch(images.masked_fill_(batch.mask[:, None], 0.0), batch.mask)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and deviation, (3, 1, 1). Kept on the device: copying them there would wait for all its work."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std
