"""A trained model that finds objects in images, as evaluation sees them:

>>> from detr_fabric import load
>>> detr = load("best.ckpt", device="cpu")  # or "cuda", "cuda:1"; unset: a GPU if there is one
>>> detr("photo.jpg", threshold=0.5)
2 dogs, 1 car above 0.5 in photo.jpg (640 x 480)

Shapes: Q queries, H×W image.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from detr_fabric.analysis.capture import SITES, Site
from detr_fabric.analysis.maps import Attention, attention
from detr_fabric.config import Config, Precision
from detr_fabric.data.batch import MicroBatch, Target, pad_images
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.transforms import resize, resized_size, size_of
from detr_fabric.errors import UserError
from detr_fabric.evaluate.coco import Detections
from detr_fabric.evaluate.detect import detect_batch
from detr_fabric.model.detr import DETR
from detr_fabric.predict.found import Found
from detr_fabric.predict.sources import (
    Item,
    Source,
    is_path,
    is_url,
    named,
    one_image,
    read_source,
    reading_threads,
)
from detr_fabric.runtime.launch import single_device
from detr_fabric.runtime.rebuild import rebuild
from detr_fabric.terminal import noun

AHEAD = 2  # batches that are read while one is predicted, and may be drawn after it


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

    def __repr__(self) -> str:
        backbone, kind, classes = self.config.model.backbone, self.config.attn.kind, self.categories.num_classes
        return f"DETR: {backbone}, {kind} attention, {classes} {noun('class', classes)}, on {self.fabric.device}"

    @property
    def names(self) -> list[str]:
        """The names of all classes that the model knows, by label.

        >>> detr.names
        ['dog', 'car']
        """
        return [self.categories.name(label) for label in range(self.categories.num_classes)]

    @overload  # a str is a sequence of str, but matches here first
    def __call__(self, images: Source, threshold: float = 0.7, batch_size: int = 1) -> Found: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, images: Sequence[Source], threshold: float = 0.7, batch_size: int = 1) -> list[Found]: ...

    def __call__(
        self, images: Source | Sequence[Source], threshold: float = 0.7, batch_size: int = 1
    ) -> Found | list[Found]:
        """The objects of one image, or of each in a list, with a score of at least `threshold`.

        In a list, a folder or a glob stands for all of its images. What is found in a file remembers the file, not its
        pixels, so lists may be long; `stream` yields the same one after the other.

        Larger batches pad images that differ in shape, which changes what is found a little. Raises UserError, a
        ValueError, for what is no image, and for a folder or a glob outside of a list.

        >>> detr("photo.jpg", threshold=0.9)
        1 dog above 0.9 in photo.jpg (640 x 480)
        >>> detr(["photo.jpg", "photos/*.jpg"])
        [1 dog, 1 car above 0.7 in photo.jpg (640 x 480), 1 dog, 1 car above 0.7 in other.jpg (640 x 480)]
        """
        if isinstance(images, (list, tuple)):  # not any Sequence: a str is one too
            return list(self.stream(images, threshold, batch_size))
        (found,) = self.stream([one_image(images)], threshold)
        return found

    def stream(
        self,
        images: Source | Iterable[Source],
        threshold: float = 0.7,
        batch_size: int = 1,
        unreadable: Callable[[UserError], object] | None = None,
    ) -> Iterator[Found]:
        """What is found in each image, one after the other in their order: in a file, a folder, a glob, or in whatever
        yields images, however many. Threads read files ahead.

        unreadable: called with the reason for each image that can't be read, which is then left out. None: the reason
        is raised, a UserError.

        >>> for found in detr.stream("photos/"):
        ...     print(found)
        1 dog, 1 car above 0.7 in other.jpg (640 x 480)
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be 1 or more")
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold is {threshold}: scores lie in [0, 1]")
        one = isinstance(images, (str, Tensor, np.ndarray)) or not isinstance(images, Iterable)
        sources: Iterable[Source] = [images] if one else images  # type: ignore[list-item, assignment]
        items = named(sources, unreadable)
        return (found for found, _ in self.each(items, threshold, batch_size, unreadable))

    def each(
        self,
        items: Iterator[Item],
        threshold: float,
        batch_size: int,
        unreadable: Callable[[UserError], object] | None,
    ) -> Iterator[tuple[Found, Tensor]]:
        """As `stream`, of images that have names, and with their pixels (3, H, W)."""
        waiting: deque[tuple[Item, Callable[[], tuple[Tensor, Prepared]]]] = deque()
        with reading_threads() as pool:
            while True:
                for item in islice(items, (AHEAD + 1) * batch_size - len(waiting)):
                    read: Callable[[], tuple[Tensor, Prepared]] = partial(self._read, item.source)
                    if is_path(item.source) or is_url(item.source):
                        read = pool.submit(read).result
                    waiting.append((item, read))
                if not waiting:
                    return
                batch = []
                for item, read in [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]:
                    try:
                        batch.append((item, *read()))
                    except UserError as error:
                        if unreadable is None:
                            raise
                        unreadable(error)
                answers = self.detect([prepared for *_, prepared in batch]) if batch else []
                for (item, image, _), answer in zip(batch, answers, strict=True):
                    yield self.above(threshold, answer, item, image), image

    def attention(self, image: Source, sites: Sequence[Site] = SITES) -> Attention:
        """What the attention blocks compute for one image: `encoder_self`, `decoder_self` and `decoder_cross`.

        sites: those that are wanted. The encoder's maps are large: 4·L·H·(h·w)² bytes, 139 MB for a photo of 800 x 1066
        pixels and ResNet-50.

        >>> found, maps = detr("photo.jpg"), detr.attention("photo.jpg")
        >>> maps.decoder_cross.shape  # layers, heads, queries, and the h x w cells of the image
        torch.Size([2, 4, 3, 8, 11])
        >>> maps.encoder_self.shape, maps.decoder_self.shape
        (torch.Size([1, 4, 8, 11, 8, 11]), torch.Size([2, 4, 3, 3]))
        >>> read_by_the_first = maps.decoder_cross[-1, :, found.queries[0]].mean(0)  # (h, w): last layer, mean of heads
        >>> round(read_by_the_first.sum().item(), 3)
        1.0
        """
        batch, _ = self.fabric.to_device(self.batch([self.prepare(read_source(one_image(image)))]))
        with self.fabric.autocast():
            return attention(self.model, batch, sites)[0]

    def prepare(self, image: Tensor) -> Prepared:
        """(3, H, W) uint8 → the same, resized as in evaluation."""
        original = size_of(image)
        return Prepared(resize(image, resized_size(*original, self.scale, self.max_size)), original)

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
        """What evaluation detects in each of the images, in one batch; image_id is the position."""
        return detect_batch(self.fabric, self.model, self.batch(images), topk=self.config.eval.topk)

    def above(self, threshold: float, detections: Detections, item: Item, image: Tensor) -> Found:
        """The detections with a score of at least `threshold`. Raises UserError where they are not finite."""
        if not (detections.scores.isfinite().all() and detections.boxes.isfinite().all()):
            raise UserError("detections are not finite: the model's weights have diverged; use an earlier checkpoint")
        order = detections.scores.argsort(descending=True, stable=True)
        rows = order[detections.scores[order] >= threshold]
        return Found(
            scores=detections.scores[rows],
            labels=detections.labels[rows],
            boxes=detections.boxes[rows],
            queries=rows if detections.queries is None else detections.queries[rows],
            categories=self.categories,
            threshold=threshold,
            best=float(detections.scores.max()),
            size=size_of(image),
            name=item.name,
            source=Path(item.source) if is_path(item.source) else image,
        )

    def _read(self, source: Source) -> tuple[Tensor, Prepared]:
        image = read_source(source)
        return image, self.prepare(image)


def load(
    checkpoint: str | os.PathLike[str],
    device: str | torch.device = "auto",
    precision: Precision | None = None,
    dc5: bool = False,
    *,
    accelerator: Literal["auto", "cpu", "cuda"] | None = None,
) -> Detector:
    """The model of a checkpoint, with the weights that its run evaluated; an original checkpoint has COCO's classes.

    device: "cpu", "cuda", or a certain GPU, "cuda:1"; "auto": a GPU if there is one. accelerator: another word for it.
    precision None: bf16-mixed on a GPU that has it, else 32-true. dc5: an original checkpoint is of a DC5 model.
    Raises UserError, a ValueError, for a file that is no checkpoint and for a device that isn't there.
    """
    rebuilt = rebuild(Path(checkpoint), dc5)
    return Detector(
        rebuilt.model, rebuilt.categories, rebuilt.config, single_device(accelerator or str(device), precision)
    )
