"""A folder of images and its COCO annotations as a data set of images and targets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detr_fabric.batch import Target
from detr_fabric.boxes import xyxy_to_cxcywh
from detr_fabric.data.annotations import Annotations, clip_boxes, read_annotations
from detr_fabric.data.categories import Categories
from detr_fabric.data.images import read_image
from detr_fabric.data.sampler import Sample
from detr_fabric.data.transforms import Transform, resize
from detr_fabric.errors import UserError

__all__ = ["Annotations", "Categories", "CocoDetection", "read_annotations"]

BadImages = Literal["stop", "next", "blank"]
IN_A_ROW = 16  # unreadable images after which it is the folder that is gone: nothing is skipped any more


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """N images in ascending id order, those without objects included.

    Samples are named by (epoch, index), and their augmentation is a pure function of (seed, epoch, index), whatever the
    number of workers.

    bad_images: what is given for an image that can't be read or has another size than annotated. "stop": a UserError
    with its id and file; "next": the next image that can be read, so that batches stay full, ranks in step and the data
    like themselves; "blank": an empty image without objects under its own id. The last two tell why in Target.fault.
    """

    def __init__(
        self, folder: Path, annotations: Annotations, transform: Transform, seed: int, bad_images: BadImages = "stop"
    ) -> None:
        self.folder = folder
        self.annotations = annotations
        self.transform = transform
        self.seed = seed
        self.bad_images = bad_images

    def __len__(self) -> int:
        return len(self.annotations)

    @property
    def categories(self) -> Categories:
        """Ids, labels and names of the classes."""
        return self.annotations.categories

    @property
    def image_ids(self) -> list[int] | list[str]:
        """(N) the data set's own image ids, in index order."""
        return cast("list[int] | list[str]", self.annotations.image_ids.tolist())

    def __getitem__(self, sample: Sample) -> tuple[Tensor, Target]:
        """(epoch, index) → (3, H, W) uint8 image after the transform, and its Target without crowds. Raises UserError
        as before_resize does."""
        image, target = self.before_resize(sample)
        return resize(image, target.size), target

    def before_resize(self, sample: Sample) -> tuple[Tensor, Target]:
        """The same but for the last step: the image is still to be resized to Target.size.

        Raises UserError where `bad_images` says stop, or for IN_A_ROW bad ones.
        """
        _, index = sample
        rng = self._rng(sample)
        fault = None
        try:
            image, boxes, labels = self.load(index)
        except UserError as error:
            if self.bad_images == "stop":
                raise UserError(f"{error}, or set --data.bad-images skip") from error
            fault = str(error)
            if self.bad_images == "blank":
                return self._blank(index, fault)
            index, (image, boxes, labels) = self._next_readable(index, error)
        orig_height, orig_width = image.shape[-2:]
        (image, boxes, labels), (height, width) = self.transform(image, boxes, labels, rng)
        target = Target(
            labels=labels,
            boxes=xyxy_to_cxcywh(boxes) / boxes.new_tensor([width, height, width, height]),
            image_id=self.annotations.image_ids[index].item(),
            orig_size=(orig_height, orig_width),
            size=(height, width),
            fault=fault,
        )
        return image, target

    def shape(self, sample: Sample) -> tuple[int, int]:
        """(height, width) of the sample, without reading its file; (0, 0) where the annotations give no size."""
        height, width = self.annotations.sizes[sample[1]].tolist()
        return self.transform.size(height, width, self._rng(sample)) if height and width else (0, 0)

    def _rng(self, sample: Sample) -> random.Random:
        epoch, index = sample
        return random.Random(f"{self.seed}-{epoch}-{index}")

    def _next_readable(self, index: int, error: UserError) -> tuple[int, tuple[Tensor, Tensor, Tensor]]:
        """The first image after `index` that can be read, with its index."""
        for step in range(1, min(IN_A_ROW, len(self))):
            other = (index + step) % len(self)
            try:
                return other, self.load(other)
            except UserError:
                continue
        raise UserError(f"{error} (nor can the images after it be read: check the folder {self.folder})") from error

    def _blank(self, index: int, fault: str) -> tuple[Tensor, Target]:
        size = (64, 64)
        image_id = self.annotations.image_ids[index].item()
        boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        return torch.zeros(3, *size, dtype=torch.uint8), Target(labels, boxes, image_id, size, size, fault)

    def load(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image `index` as it is: (3, H, W) uint8, (n, 4) float32 xyxy boxes clipped to it, (n,) int64 labels."""
        file, image_id = self.folder / str(self.annotations.file_names[index]), self.annotations.image_ids[index].item()
        try:
            image = read_image(file)
        except UserError as error:
            raise UserError(f"image {image_id!r}: {error}") from error
        height, width = image.shape[-2:]
        for side, found, expected in zip(
            ("height", "width"), (height, width), self.annotations.sizes[index].tolist(), strict=True
        ):
            if expected not in (0, found):
                raise UserError(
                    f"image {image_id!r}: {file} has {side} {found}, but {expected} in the annotations: correct either"
                )
        objects = self.annotations.objects(index)
        crowd = self.annotations.crowd[objects]
        boxes = clip_boxes(self.annotations.boxes[objects][~crowd], height, width)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return image, torch.from_numpy(boxes[keep]), torch.from_numpy(self.annotations.labels[objects][~crowd][keep])

    def ground_truth(self) -> dict[str, Any]:
        """A COCO-format dictionary for scoring, crowds included, with everything renumbered: image id = index + 1,
        category id = label + 1, annotation ids from 1 (scoring never counts an annotation with id 0 as found)."""
        known = self.annotations
        image_of_object = np.repeat(np.arange(len(known)), np.diff(known.offsets)) + 1
        objects = zip(
            image_of_object.tolist(),
            (known.labels + 1).tolist(),
            known.boxes.tolist(),
            known.areas.tolist(),
            known.crowd.astype(int).tolist(),
            strict=True,
        )
        return {
            "info": {},
            "images": [
                {"id": index + 1, "height": height, "width": width}
                for index, (height, width) in enumerate(known.sizes.tolist())
            ],
            "categories": [
                {"id": self.categories.label(id) + 1, "name": name}
                for id, name in zip(self.categories.ids, self.categories.names, strict=True)
            ],
            "annotations": [
                {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
                for number, (image, label, box, area, crowd) in enumerate(objects, 1)
            ],
        }
