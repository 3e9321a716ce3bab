"""A folder of images and their annotations as a data set of images and targets.

H x W pixels, N objects; boxes are xyxy in pixels until a Target holds them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detr_fabric.boxes import xyxy_to_cxcywh
from detr_fabric.data.batch import Size, Target
from detr_fabric.data.formats.annotations import Annotations, clip_boxes
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.images import read_image
from detr_fabric.data.own_augment import OwnAugment
from detr_fabric.data.sampler import SampleKey
from detr_fabric.data.transforms import Transform, resize, size_of
from detr_fabric.errors import UserError

BadImages = Literal["stop", "next", "blank"]
IN_A_ROW = 16  # after this many unreadable images in a row the folder itself must be wrong


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Images in ascending id order, including those without objects.

    A sample is named by (epoch, index). Its augmentation is a function of (seed, epoch, index) alone, so it does not
    depend on the number of workers.

    bad_images: what to do about an image that can't be read or whose size differs from its annotation. "stop" raises a
    UserError. "next" takes the next readable image instead: batches stay full and ranks in step. "blank" returns an
    empty image without objects under the bad image's id. The last two give the reason in Target.read_error.
    """

    def __init__(
        self, folder: Path, annotations: Annotations, transform: Transform, seed: int, bad_images: BadImages = "stop"
    ) -> None:
        self.folder = folder
        self.annotations = annotations
        self.transform = transform
        self.seed = seed
        self.bad_images = bad_images
        self.augment: OwnAugment | None = None  # what --data.augment names comes before the transform

    def __len__(self) -> int:
        return len(self.annotations)

    @property
    def categories(self) -> Categories:
        return self.annotations.categories

    @property
    def image_ids(self) -> list[int] | list[str]:
        return cast("list[int] | list[str]", self.annotations.image_ids.tolist())

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Target]:
        """(3, H, W) uint8 image after the transform, and its Target without crowds. Raises UserError for a bad image,
        see `bad_images`, and for IN_A_ROW of them."""
        image, target = self.before_resize(key)
        return resize(image, target.size), target

    def before_resize(self, key: SampleKey) -> tuple[Tensor, Target]:
        """Like `__getitem__`, without the final resize to Target.size: load_batch resizes directly into the batch."""
        index, read_error = key[1], None
        try:
            image, boxes, labels = self.load(index)
        except UserError as error:
            if self.bad_images == "stop":
                raise UserError(f"{error}, or set --data.bad-images skip") from error
            read_error = str(error)
            if self.bad_images == "blank":
                return self._blank(index, read_error)
            index, (image, boxes, labels) = self._next_readable(index, error)
        image_id, orig_size = self.annotations.image_ids[index].item(), size_of(image)
        if self.augment is not None:
            image, boxes, labels = self.augment(image, boxes, labels, self._rng(key), image_id)
        plan = self.transform.plan(*size_of(image), self._rng(key))
        height, width = plan.size
        image, boxes, labels = plan.apply(image, boxes, labels)
        boxes = xyxy_to_cxcywh(boxes) / boxes.new_tensor([width, height, width, height])
        return image, Target(labels, boxes, image_id, orig_size, plan.size, read_error)

    def load(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image `index` before any transform: (3, H, W) uint8, its (N, 4) float32 boxes clipped to it, (N,) labels."""
        file, image_id = self.folder / str(self.annotations.file_names[index]), self.annotations.image_ids[index].item()
        expected = cast("tuple[int, int]", tuple(self.annotations.sizes[index].tolist()))
        try:
            image = read_image(file, bool(self.annotations.turned[index]), expected)
        except UserError as error:
            raise UserError(f"image {image_id!r}: {error}") from error
        for side, found, annotated in zip(("height", "width"), size_of(image), expected, strict=True):
            if annotated not in (0, found):
                raise UserError(
                    f"image {image_id!r}: {file} has {side} {found}, but {annotated} in the annotations: correct either"
                )
        objects = self.annotations.objects(index)
        usable = ~self.annotations.crowd[objects]
        boxes = clip_boxes(self.annotations.boxes[objects][usable], *size_of(image))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return image, torch.from_numpy(boxes[keep]), torch.from_numpy(self.annotations.labels[objects][usable][keep])

    def size(self, key: SampleKey) -> Size:
        """Size of the sample after its transform, without reading the file; (0, 0) if the annotations don't give it.
        What a function of one's own (`augment`) changes is not seen here: sizes only decide what is grouped."""
        height, width = self.annotations.sizes[key[1]].tolist()
        return self.transform.plan(height, width, self._rng(key)).size if height and width else (0, 0)

    def _rng(self, key: SampleKey) -> random.Random:
        epoch, index = key
        return random.Random(f"{self.seed}-{epoch}-{index}")

    def _next_readable(self, index: int, error: UserError) -> tuple[int, tuple[Tensor, Tensor, Tensor]]:
        """The first readable image after `index`, with its index."""
        for step in range(1, min(IN_A_ROW, len(self))):
            other = (index + step) % len(self)
            try:
                return other, self.load(other)
            except UserError:
                continue
        raise UserError(f"{error} (nor can the images after it be read: check the folder {self.folder})") from error

    def _blank(self, index: int, read_error: str) -> tuple[Tensor, Target]:
        size = (64, 64)
        image_id = self.annotations.image_ids[index].item()
        boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        return torch.zeros(3, *size, dtype=torch.uint8), Target(labels, boxes, image_id, size, size, read_error)
