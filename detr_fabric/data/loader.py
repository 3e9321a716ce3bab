"""Batches for training and evaluation: which images they hold, and how these become padded tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from detr_fabric.config import DataConfig
from detr_fabric.data.batch import MicroBatch, allocate_batch
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.padding import split_batch
from detr_fabric.data.sampler import WHOLE, SampleKey, Shard, eval_batches, step_batches, steps_per_epoch
from detr_fabric.data.transforms import resize
from detr_fabric.data.workers import Workers


class TrainLoader:
    """Training batches whose content is a pure function of (seed, epoch, step, rank, world).

    pin: pin batches in memory, for a GPU. Raises UserError if the data set does not fill one global batch.
    """

    def __init__(
        self,
        dataset: CocoDetection,
        *,
        batch_size: int,
        accumulate: int,
        data: DataConfig,
        shard: Shard = WHOLE,
        pin: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.data = data
        self.shard = shard
        self.global_batch = shard.world * accumulate * batch_size
        self.steps_per_epoch = steps_per_epoch(len(dataset), batch_size, accumulate, shard.world)
        load = partial(load_batch, dataset, pad_multiple=data.pad_multiple, max_pixels=data.max_batch_pixels)
        self.workers = Workers(load, dataset.annotations.image_ids, data.workers, pin)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[list[MicroBatch]]:
        """The optimizer steps of an epoch, without reading the first `skip`: `accumulate` micro-batches each, or more
        if one exceeds --data.max-batch-pixels. Starting another epoch ends this one."""
        num_images, seed, sizes = len(self.dataset), self.dataset.seed, None
        if self.data.group_by_shape:
            sizes = [self.dataset.size((epoch, index)) for index in range(num_images)]
        steps = step_batches(num_images, seed, epoch, self.batch_size, self.accumulate, self.shard, skip, sizes)
        batches = self.workers.read([keys for step in steps for keys in step])
        for _ in steps:
            yield [part for _ in range(self.accumulate) for part in next(batches)]


class EvalLoader:
    """This rank's share of a data set; every rank has the same number of images, so a few may come twice.

    Batches of one image come in the data set's order. Larger ones are sorted by size, so that there is little padding:
    it would change the features of the image beside it, and with them the result.
    """

    def __init__(
        self, dataset: CocoDetection, *, batch_size: int, data: DataConfig, shard: Shard = WHOLE, pin: bool = False
    ) -> None:
        self.dataset = dataset
        order = list(range(len(dataset)))
        if batch_size > 1:
            order.sort(key=lambda index: dataset.size((0, index)))  # once resized, one side is nearly always the same
        self.order = [[(0, index) for index in batch] for batch in eval_batches(order, batch_size, shard)]
        load = partial(load_batch, dataset, pad_multiple=data.pad_multiple)
        self.workers = Workers(load, dataset.annotations.image_ids, data.workers, pin)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[MicroBatch]:
        for parts in self.workers.read(self.order):
            yield from parts


def load_batch(
    dataset: CocoDetection, keys: list[SampleKey], pad_multiple: int = 1, max_pixels: int | None = None
) -> list[MicroBatch]:
    """Reads these samples into one padded batch, or into several of at most `max_pixels` each."""
    images, targets = zip(*[dataset.before_resize(key) for key in keys], strict=True)
    batches = []
    for part in split_batch([target.size for target in targets], max_pixels, pad_multiple):
        batch, views = allocate_batch([targets[position].size for position in part], pad_multiple)
        for position, view in zip(part, views, strict=True):
            resize(images[position], targets[position].size, out=view)
        batches.append((batch, [targets[position] for position in part]))
    return batches
