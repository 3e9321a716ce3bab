"""The images that an export is tried on, and how far its answers are from the model's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.data.batch import ImageBatch, normalize, pad_images
from detr_fabric.data.build import build_validation_by_name
from detr_fabric.data.images import read_image, to_tensor
from detr_fabric.data.synthetic import scene
from detr_fabric.errors import UserError
from detr_fabric.export.graph import Run, Sides
from detr_fabric.model.detr import DETR, class_scores
from detr_fabric.predict.detector import Detector
from detr_fabric.predict.paths import find_images
from detr_fabric.terminal import say

if TYPE_CHECKING:
    from detr_fabric.export.settings import Settings

IMAGES = 10  # that a file is tried on
BATCH = 3  # of them in a padded batch


class Difference(NamedTuple):
    """How far a file's answers are from the model's."""

    largest: float  # of scores and boxes, both in [0, 1]
    labels: int  # that are others, of classes that score alike


def trial_images(detector: Detector, settings: Settings, limits: Sides) -> tuple[list[Tensor], str]:
    """IMAGES images (3, H, W) uint8 as evaluation sizes them, and what they are.

    From --images, else from the validation data; scenes take the place of those that are missing.
    """
    images: list[Tensor] = []
    if settings.images:
        source = " ".join(settings.images)
        images = fitting(detector, limits, _read(settings.images))
    elif not settings.data.builtin:
        source = "the validation data"
        data = replace(detector.config, data=settings.data).resolve().data
        try:
            dataset, _ = build_validation_by_name(data, detector.categories, 0)
            images = fitting(detector, limits, (dataset.load(index)[0] for index in range(len(dataset))))
        except UserError as error:
            if data != detector.config.data:
                raise  # the user asked for these
            say(f"the validation data of training can't be used: {error}", sys.stderr)
    parts = [f"{len(images)} images of {source}"] if images else []
    missing = IMAGES - len(images)
    if missing:
        images += fitting(detector, limits, _scenes(settings.data.shapes_size))[:missing]
        parts.append(f"{missing} built-in scenes")
    return images, " and ".join(parts)


def fitting(detector: Detector, limits: Sides, images: Iterator[Tensor]) -> list[Tensor]:
    """The first IMAGES that are inside the limits, resized."""
    resized = (detector.prepare(image).image for image in images)
    return list(islice((x for x in resized if min(x.shape[1:]) >= limits.smallest), IMAGES))


def _read(paths: Sequence[str]) -> Iterator[Tensor]:
    for path, _ in find_images(paths, leave_out=Path()):
        try:
            yield read_image(path)
        except UserError as error:
            say(f"left out: {error}", sys.stderr)


def _scenes(size: int) -> Iterator[Tensor]:
    """Scenes of different shapes, so that batches of them are padded."""
    for index in range(IMAGES):
        image = to_tensor(scene("val2017", index, size)[0])
        kept = size - index * size // (2 * IMAGES)
        yield image[:, :kept] if index % 2 else image[:, :, :kept]


def trial_batches(images: Sequence[Tensor]) -> list[ImageBatch]:
    """Images one by one, and in padded batches."""
    batches = [pad_images([image]) for image in images]
    return batches + [padded(images[first : first + BATCH]) for first in range(0, len(images), BATCH)]


def difference(
    model: DETR, run: Run, batches: Sequence[ImageBatch], progress: Callable[[int], None] = lambda done: None
) -> Difference:
    """The largest difference between what a file and the model find in batches of images.

    A label may be another one where two classes score alike: the file's is held against the model's score for it.
    """
    largest, other = 0.0, 0
    for done, batch in enumerate(batches, 1):
        scores, labels, boxes = run(batch.images.contiguous(), batch.mask)
        with torch.no_grad():
            outputs = model(*normalize(batch))
        probabilities = class_scores(outputs.pred_logits[-1], model.focal)  # (B, Q, C)
        best = probabilities.max(-1)
        if not (best.values.isfinite().all() and outputs.pred_boxes.isfinite().all()):
            raise UserError("the model's answers are not finite: its weights have diverged; use an earlier checkpoint")
        here = probabilities.gather(-1, labels[..., None])[..., 0]
        answers = (scores - best.values, scores - here, boxes - cxcywh_to_xyxy(outputs.pred_boxes[-1]))
        largest = max(largest, *(x.abs().nan_to_num(nan=torch.inf).max().item() for x in answers))
        other += int((labels != best.indices).sum())
        progress(done)
    return Difference(largest, other)


def padded(images: Sequence[Tensor]) -> ImageBatch:
    """A batch with padding: of images of one shape the last loses its right quarter."""
    batch = pad_images(list(images))
    if not batch.mask.any():
        batch.mask[-1, :, -(batch.mask.shape[-1] // 4) :] = True
    return batch
