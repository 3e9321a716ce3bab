"""A trained model that finds objects in images, as evaluation sees them:

from detr_fabric import load

detr = load("runs/x/best.ckpt")
found = detr("photo.jpg")  # found.names, found.scores, found.boxes

Shapes: N objects, Q queries, H×W image.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor

from detr_fabric.batch import Target, pad_images
from detr_fabric.checkpoint import load_model_state, our_checkpoint, read_torch_file
from detr_fabric.config import Config, Precision
from detr_fabric.data.categories import Categories
from detr_fabric.data.images import read_image, to_tensor
from detr_fabric.data.loader import MicroBatch
from detr_fabric.data.transforms import EvalTransform, resize, size_of
from detr_fabric.errors import UserError
from detr_fabric.evaluation import detect_batch
from detr_fabric.launch import single_device
from detr_fabric.model.detr import DETR, build_model
from detr_fabric.official import COCO, is_official, official_config
from detr_fabric.scoring import Detections

Source = str | os.PathLike[str] | Image.Image | Tensor | np.ndarray
"""An image: a file; a Pillow image; a tensor (3, H, W) or an array (H, W, 3), uint8 RGB."""


class Found(NamedTuple):
    """What was found in one image, the surest first."""

    scores: Tensor  # (N,) float32 in [0, 1]
    labels: Tensor  # (N,) int64, the model's own class ids
    names: list[str]  # N names of classes
    boxes: Tensor  # (N, 4) float32 xyxy in pixels of the image
    queries: Tensor  # (N,) int64, the object queries that found them


class Prepared(NamedTuple):
    """An image as the model takes it."""

    image: Tensor  # (3, H', W') uint8
    orig_size: tuple[int, int]  # (H, W)


class Detector:
    """A model in evaluation mode on one device, with its classes and its way of preparing images."""

    def __init__(self, model: DETR, categories: Categories, config: Config, fabric: Fabric) -> None:
        """config: resolved."""
        assert config.data.scales is not None and config.data.max_size is not None
        self.model = fabric.setup_module(model).eval()
        self.categories, self.config, self.fabric = categories, config, fabric
        self.scale, self.max_size = config.data.scales[-1], config.data.max_size
        self.transform = EvalTransform(self.scale, self.max_size)

    @overload  # a str is a sequence of str, but matches here first
    def __call__(self, images: Source, threshold: float = 0.7, batch_size: int = 1) -> Found: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, images: Sequence[Source], threshold: float = 0.7, batch_size: int = 1) -> list[Found]: ...

    def __call__(
        self, images: Source | Sequence[Source], threshold: float = 0.7, batch_size: int = 1
    ) -> Found | list[Found]:
        """The objects of one image, or of each in a list, with a score of at least `threshold`.

        Larger batches pad images that differ in shape, which changes what is found a little. Raises UserError, a
        ValueError, for what is no image.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be 1 or more")
        if not isinstance(images, (list, tuple)):
            (prepared,) = [self.prepare(read_source(images))]  # type: ignore[arg-type]
            return self.above(threshold, self.detect([prepared])[0])
        found = []
        for first in range(0, len(images), batch_size):
            batch = [self.prepare(read_source(image)) for image in images[first : first + batch_size]]
            found += [self.above(threshold, detections) for detections in self.detect(batch)]
        return found

    def prepare(self, image: Tensor) -> Prepared:
        """(3, H, W) uint8 → the same, resized as in evaluation."""
        original = size_of(image)
        return Prepared(resize(image, self.transform.size(*original, random.Random(0))), original)

    def batch(self, images: Sequence[Prepared]) -> MicroBatch:
        """Images as evaluation batches them, with targets that know their sizes and no objects."""
        targets = [
            Target(
                labels=torch.zeros(0, dtype=torch.int64),
                boxes=torch.zeros(0, 4),
                image_id=number,
                orig_size=orig_size,
                size=(image.shape[-2], image.shape[-1]),
            )
            for number, (image, orig_size) in enumerate(images)
        ]
        return pad_images([image for image, _ in images], self.config.data.pad_multiple), targets

    def detect(self, images: Sequence[Prepared]) -> list[Detections]:
        """The answers of all Q queries for each of the images, in one batch; image_id is the position."""
        return detect_batch(self.fabric, self.model, self.batch(images))

    def above(self, threshold: float, detections: Detections) -> Found:
        """The detections with a score of at least `threshold`. Raises UserError where they are not finite."""
        if not (detections.scores.isfinite().all() and detections.boxes.isfinite().all()):
            raise UserError("detections are not finite: the model's weights have diverged; use an earlier checkpoint")
        order = detections.scores.argsort(descending=True, stable=True)
        queries = order[detections.scores[order] >= threshold]
        labels = detections.labels[queries]
        names = [self.categories.name(label) for label in labels.tolist()]
        return Found(detections.scores[queries], labels, names, detections.boxes[queries], queries)


def load(
    checkpoint: str | os.PathLike[str],
    accelerator: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Precision | None = None,
    dc5: bool = False,
) -> Detector:
    """The model of a checkpoint, or of an official file, then with COCO's classes.

    precision None: bf16-mixed on a GPU that has it, else 32-true. dc5: an official file is of a DC5 model.
    Raises UserError, a ValueError, for a file that is no checkpoint and for a device that isn't there.
    """
    path = Path(checkpoint)
    content = read_torch_file(path)
    if is_official(content):
        config, categories = official_config(content, path, dc5), COCO
    else:
        content = our_checkpoint(content, path)
        config = Config.from_dict(content["config"]).resolve()
        categories = Categories.from_dict(content["categories"])
        if dc5 and not config.model.dilation:
            raise UserError(f"{path}: its model is not dilated; dc5 is for official files of a DC5 model")
    model = build_model(config.model, config.attn, categories.num_classes, pretrained=False)
    load_model_state(model, content["model"], str(checkpoint))
    return Detector(model, categories, config, single_device(accelerator, precision))


def read_source(image: Any) -> Tensor:
    """(3, H, W) uint8 RGB of a Source. Raises UserError for anything else."""
    if isinstance(image, (str, os.PathLike)):
        if not Path(image).is_file():  # read_image would wait for it to come back
            raise UserError(f"{image}: no such file")
        return read_image(Path(image))
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            shape = tuple(image.shape)
            raise UserError(
                f"a tensor of {image.dtype} {shape} is no image: give uint8 RGB of shape (3, height, width)"
            )
        return image.cpu()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise UserError(
                f"an array of {image.dtype} {image.shape} is no image: give uint8 RGB of shape (height, width, 3)"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if isinstance(image, Image.Image):
        try:
            return to_tensor(image)
        except Exception as error:  # on damaged files Pillow raises nearly anything
            raise UserError(f"a Pillow image can't be read ({error}): open it again, or give its file") from error
    raise UserError(f"{type(image).__name__} is no image: give a file, a Pillow image, or uint8 pixels")
