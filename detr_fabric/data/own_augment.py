"""Augmentation of one's own (--data.augment FILE.py): a function of a file over an image and its boxes.

experiments/augment_example.py shows one. What it gets is an image as it was read, and what it returns is resized to
data.scales and data.max_size, made a Target and normalised like any other image.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image

from detr_fabric.data.transforms import crop_region, size_of
from detr_fabric.errors import UserError
from detr_fabric.presets import run_file

Augment = Callable[[Image, dict[str, Any]], Any]
"""(image, target) → the same two, changed; a transform of torchvision.transforms.v2 is one.

image: (3, H, W) uint8 RGB. target: "boxes", (N, 4) float32 xyxy in pixels, and "labels", (N,) int64 class ids from 0.
"""
ROUNDING = 2  # pixels by which torchvision's rotations differ for image and boxes; without boxes it forgets the size
RETURNS = "return (image, target), target with boxes and labels"


class OwnAugment:
    """The function `augment` of a file, checked each time that it returns.

    What it draws from torch's, Python's and NumPy's global generators is a function of (seed, epoch, index), and leaves
    no trace in them. It must keep no state of its own, or runs can't be repeated.
    """

    def __init__(self, file: str, num_classes: int) -> None:
        """Runs the file. Raises UserError where it can't be read, fails, or defines no such function."""
        self.file, self.num_classes = file, num_classes
        self.source = f"--data.augment {file}"
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise UserError(f"{self.source}: {error.strerror}; give a Python file, or original") from error
        self.digest = hashlib.blake2b(content, digest_size=16).hexdigest()  # not of files that it imports
        function = getattr(run_file(Path(file), self.source), "augment", None)
        if not callable(function):
            raise UserError(f"{self.source}: define augment(image, target) in it, see experiments/augment_example.py")
        self.function: Augment = function

    def __reduce__(self) -> tuple[type[OwnAugment], tuple[str, int]]:
        """A worker that is not forked runs the file again: Python can't send functions of a file without a package."""
        return OwnAugment, (self.file, self.num_classes)

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor, rng: random.Random, image_id: int | str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image (3, H, W) uint8, boxes (N, 4) xyxy in pixels and labels (N,) after the function. The size may change.
        Boxes are cut off at the image's edge, and objects left without area are dropped, as by the original's crop.

        Raises UserError, with the file and the image, when the function fails or returns anything else.
        """
        canvas = (image.shape[-2], image.shape[-1])
        target = {"boxes": BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=canvas), "labels": labels}
        try:
            with seeded(rng.getrandbits(32)):
                returned = self.function(Image(image), target)
            image, boxes, labels = self._checked(returned)
        except Exception as error:  # a user's function may raise anything
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reason = " ".join(str(error).split())[:500]
            raise UserError(f"{self.source}: augment on image {image_id!r}: {kind}{reason}") from error
        return crop_region(image, boxes, labels, (0, 0, *size_of(image)))

    def _checked(self, returned: object) -> tuple[Tensor, Tensor, Tensor]:
        """What the function returned, as plain tensors with boxes as xyxy. Raises UserError unless it makes sense."""
        match returned:
            case [Tensor() as image, {"boxes": Tensor() as boxes, "labels": Tensor() as labels}]:
                pass
            case _:
                raise UserError(f"it returned {type(returned).__name__}, not what it was given: {RETURNS}")
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise UserError(
                f"its image is {image.dtype} {tuple(image.shape)}: return uint8 RGB of shape (3, height, width), which "
                "is converted and normalised later"
            )
        if boxes.shape != (len(boxes), 4) or labels.shape != (len(boxes),) or labels.dtype != torch.int64:
            raise UserError(
                f"its boxes are {tuple(boxes.shape)} and its labels {labels.dtype} {tuple(labels.shape)}: return boxes "
                "(N, 4) and int64 labels (N,), without those of the boxes that are gone"
            )
        if isinstance(boxes, BoundingBoxes):
            apart = max(abs(a - b) for a, b in zip(boxes.canvas_size, image.shape[1:], strict=True))
            if len(boxes) and apart > ROUNDING:
                raise UserError(
                    f"its boxes are of an image of {boxes.canvas_size} pixels, its image has {tuple(image.shape[1:])}: "
                    "transform both"
                )
            boxes = box_convert(boxes.as_subclass(Tensor), boxes.format.value.lower(), "xyxy")
        boxes = boxes.as_subclass(Tensor).float()
        if not boxes.isfinite().all() or (boxes[:, 2:] < boxes[:, :2]).any():
            raise UserError("a box is not finite, or its right or lower edge lies before the other: return xyxy pixels")
        if not all(0 <= label < self.num_classes for label in labels.tolist()):
            raise UserError(f"a label lies outside 0 to {self.num_classes - 1}, the classes of the data")
        return image.as_subclass(Tensor), boxes, labels.as_subclass(Tensor)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it the global generators on the CPU start from `seed`; afterwards they go on as if nothing had been drawn.

    torch.manual_seed would seed a GPU's generator too.
    """
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
