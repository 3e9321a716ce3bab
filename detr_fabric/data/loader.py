"""Batches for training and evaluation, and build_datasets: from the data settings to the two data sets."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from detr_fabric.batch import ImageBatch, Target, padding_for
from detr_fabric.config import DataConfig
from detr_fabric.data import sampler, shapes
from detr_fabric.data.coco import Annotations, Categories, CocoDetection, read_annotations
from detr_fabric.data.foreign import Matched, match_by_name
from detr_fabric.data.layouts import root_paths
from detr_fabric.data.padding import Padding, padding_of, passes
from detr_fabric.data.sampler import Sample
from detr_fabric.data.split import split
from detr_fabric.data.transforms import EvalTransform, TrainTransform, resize
from detr_fabric.errors import UserError

MicroBatch = tuple[ImageBatch, list[Target]]
_Packed = tuple[np.ndarray, np.ndarray, tuple[Any, ...]]  # labels, boxes, and the rest of a Target

PREFETCH = 2  # batches that each worker loads ahead
ESTIMATED = 4096  # images from which the share of padding is estimated
WORKER_TIMEOUT = 600  # seconds for one batch before a hanging file system is reported


class TrainLoader:
    """Training batches whose content is a pure function of (seed, epoch, step, rank, world).

    Workers live as long as the loader. UserErrors raised in them arrive as they are.
    """

    def __init__(
        self,
        dataset: CocoDetection,
        batch_size: int,
        accumulate: int,
        seed: int,
        rank: int,
        world: int,
        workers: int,
        pad_multiple: int,
        pin_memory: bool,
        group_by_shape: bool = False,
        max_batch_pixels: int | None = None,
    ) -> None:
        """group_by_shape, max_batch_pixels: as in config.DataConfig. Raises UserError when the data set does not fill
        one global batch."""
        self.steps_per_epoch = sampler.steps_per_epoch(len(dataset), batch_size, accumulate, world)
        self.global_batch = world * accumulate * batch_size
        self.dataset = dataset
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.rank = rank
        self.world = world
        self.pad_multiple = pad_multiple
        self.group_by_shape = group_by_shape
        self.max_batch_pixels = max_batch_pixels
        self.batches = _BatchStream(dataset, workers, pad_multiple, pin_memory, max_batch_pixels)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[list[MicroBatch]]:
        """The optimizer steps of an epoch, `accumulate` micro-batches each, and more where one is too large; the first
        `skip` are left out unread.

        One pass at a time: a new one ends the last.
        """
        num_images = len(self.dataset)
        shapes = None
        if self.group_by_shape:
            shapes = {index: self.dataset.shape((epoch, index)) for index in range(num_images)}
        steps = sampler.step_batches(
            num_images, self.seed, epoch, self.batch_size, self.accumulate, self.rank, self.world, skip, shapes
        )
        stream = self.batches.read([micro_batch for step in steps for micro_batch in step])
        for _ in steps:
            yield [part for _ in range(self.accumulate) for part in next(stream)]

    def padding(self, group_by_shape: bool) -> Padding | None:
        """Of the first epoch, with or without grouping; estimated from part of the images, of which none is read. None
        where the annotations hardly give sizes."""
        data = self.dataset
        known = np.flatnonzero((data.annotations.sizes > 0).all(1)).tolist()
        if 2 * len(known) < len(data):
            return None
        shapes = [data.shape((0, index)) for index in known[:: -(-len(known) // ESTIMATED)]]
        global_batch = min(self.global_batch, len(shapes))
        order = sampler.epoch_order(len(shapes), self.seed, 0)[: len(shapes) // global_batch * global_batch]
        if group_by_shape:
            by_image = dict(enumerate(shapes))
            order = sampler.like_shapes_together(order, by_image, global_batch, random.Random(self.seed))
        starts = range(0, len(order), self.batch_size)
        batches = [[shapes[index] for index in order[start : start + self.batch_size]] for start in starts]
        return padding_of(batches, self.max_batch_pixels, self.pad_multiple)


class EvalLoader:
    """This rank's share of a data set; all ranks have equally many images, so a few may come twice.

    In the data set's order one by one, in batches by shape, so that little is padded: what padding does to the features
    beside it is also what makes results depend on the size of a batch.
    """

    def __init__(
        self,
        dataset: CocoDetection,
        batch_size: int,
        rank: int,
        world: int,
        workers: int,
        pad_multiple: int,
        pin_memory: bool,
    ) -> None:
        order = list(range(len(dataset)))
        if batch_size > 1:
            order.sort(key=lambda index: dataset.shape((0, index)))  # one side is nearly always the same
        batches = sampler.eval_batches(order, batch_size, rank, world)
        self.order = [[(0, index) for index in batch] for batch in batches]
        self.batches = _BatchStream(dataset, workers, pad_multiple, pin_memory)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[MicroBatch]:
        for parts in self.batches.read(self.order):
            yield from parts


class _BatchStream:
    """Loads lists of samples in order, in processes that stay alive between calls of read."""

    def __init__(
        self,
        dataset: CocoDetection,
        workers: int,
        pad_multiple: int,
        pin_memory: bool,
        max_batch_pixels: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.order = _Order()
        self.in_flight = max(1, PREFETCH * workers)
        self.loader = DataLoader(
            Batches(dataset, pad_multiple, max_batch_pixels),
            batch_size=None,  # an item is a whole batch already
            sampler=self.order,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers > 0 else None,
            collate_fn=_unchanged,
            worker_init_fn=_leave_process_group,
            generator=torch.Generator(),  # without its own, every epoch would move the global generator
            persistent_workers=workers > 0,
            timeout=WORKER_TIMEOUT if workers > 0 else 0,
            pin_memory=pin_memory,
        )

    def read(self, order: list[list[Sample]]) -> Iterator[list[MicroBatch]]:
        """The batches of `order`, each in one part or, where it is too large, in several.

        Raises UserError for a bad file, or for a worker that died or hangs.
        """
        self.order.batches = order
        results = iter(self.loader)
        for position in range(len(order)):
            try:
                result = next(results)
            except RuntimeError as error:
                if str(error).startswith("DataLoader "):
                    raise self._lost(str(error), order[position : position + self.in_flight]) from error
                raise
            if isinstance(result, UserError):
                raise result
            yield [(images, [_unpacked(target) for target in targets]) for images, targets in result]

    def _lost(self, reason: str, batches: list[list[Sample]]) -> UserError:
        ids = [str(self.dataset.annotations.image_ids[index]) for samples in batches for _, index in samples]
        names = ", ".join(ids[:16]) + (", ..." if len(ids) > 16 else "")
        reason = reason.splitlines()[0].rstrip(".")
        return UserError(f"{reason}, while images {names} were loaded: check these files, or lower --data.workers")


class _Order:
    """The samples of the current pass, read in the main process, so that they can change between passes."""

    def __init__(self) -> None:
        self.batches: list[list[Sample]] = []

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Batches(Dataset[Any]):
    """A list of samples → one padded batch and its packed targets, or several of at most max_batch_pixels.

    A UserError is returned, not raised: DataLoader would bury its sentence in the worker's traceback.
    """

    def __init__(self, dataset: CocoDetection, pad_multiple: int, max_batch_pixels: int | None) -> None:
        self.dataset = dataset
        self.pad_multiple = pad_multiple
        self.max_batch_pixels = max_batch_pixels

    def __getitem__(self, samples: list[Sample]) -> list[tuple[ImageBatch, list[_Packed]]] | UserError:
        try:
            images, targets = zip(*[self.dataset.before_resize(sample) for sample in samples], strict=True)
        except UserError as error:
            return error
        parts = passes([target.size for target in targets], self.max_batch_pixels, self.pad_multiple)
        batches = []
        for part in parts:
            batch, places = padding_for([targets[p].size for p in part], self.pad_multiple)
            for p, place in zip(part, places, strict=True):
                resize(images[p], targets[p].size, out=place)
            batches.append((batch, [_packed(targets[p]) for p in part]))
        return batches


def _packed(target: Target) -> _Packed:
    """Arrays go from a worker by value; tensors would take a file descriptor and 0.2 ms each."""
    return target.labels.numpy(), target.boxes.numpy(), target[2:]


def _unpacked(packed: _Packed) -> Target:
    labels, boxes, rest = packed
    return Target(torch.from_numpy(labels), torch.from_numpy(boxes), *rest)


def _unchanged(batch: Any) -> Any:
    return batch


def _leave_process_group(worker: int) -> None:
    """Ctrl+C signals the whole process group, SLURM every process of a job: the trainer finishes its step, for which it
    needs its workers. They obey its own SIGTERM alone."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is not None and hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_sigterm, args=(trainer.pid,), daemon=True).start()


def _wait_for_sigterm(sender: int) -> None:
    """A handler is not told who sent the signal, and waits for the end of a call that hangs."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)


def build_datasets(data: DataConfig, seed: int) -> tuple[CocoDetection, CocoDetection]:
    """Training and validation data of resolved settings (Config.resolve); validation uses the training categories.

    Raises UserError naming the file or folder and the flag when something is missing or wrong.
    """
    assert data.scales is not None and data.max_size is not None and data.crop is not None, "resolve the config first"
    images, file = _paths(data, "train")
    annotations = read_annotations(file, None, data.label_space, images)
    if data.val_fraction is not None:
        annotations, _ = split(annotations, data.val_fraction)
    annotations = annotations.first(data.train_limit, with_objects=True)
    augment = TrainTransform(data.scales, data.max_size, data.flip, data.crop)
    train = CocoDetection(images, annotations, augment, seed, "next" if data.bad_images == "skip" else "stop")
    return train, build_validation(data, train.categories, seed)


def build_validation(data: DataConfig, categories: Categories, seed: int) -> CocoDetection:
    """The images that resolved settings evaluate on, under the evaluation transform and labelled by `categories`: those
    of the training data or of a checkpoint. Raises UserError as build_datasets does."""
    images, file = _paths(data, _part(data))
    return _validation(data, images, read_annotations(file, categories, data.label_space, images), seed)


def build_foreign_validation(data: DataConfig, categories: Categories, seed: int) -> tuple[CocoDetection, Matched]:
    """As build_validation, for annotations whose classes go by name, and what came of matching them."""
    images, file = _paths(data, _part(data))
    matched = match_by_name(file, categories, images)
    return _validation(data, images, matched.annotations, seed), matched


def _part(data: DataConfig) -> Literal["train", "val"]:
    """Where the images to evaluate on come from."""
    return "train" if data.validate_on_train or data.val_fraction is not None else "val"


def _validation(data: DataConfig, images: Path, annotations: Annotations, seed: int) -> CocoDetection:
    assert data.scales is not None and data.max_size is not None, "resolve the config first"
    if data.val_fraction is not None:
        _, annotations = split(annotations, data.val_fraction)
    if data.validate_on_train:
        annotations = annotations.first(data.train_limit, with_objects=True)
    annotations = annotations.first(data.val_limit, with_objects=False)
    transform = EvalTransform(data.scales[-1], data.max_size)
    return CocoDetection(images, annotations, transform, seed, "blank" if data.bad_images == "skip" else "stop")


def _paths(data: DataConfig, part: Literal["train", "val"]) -> tuple[Path, Path]:
    """Images and annotations, both checked to exist."""
    if data.builtin:
        root = shapes.prepare(data.shapes_size, data.shapes_train, data.shapes_val, data.shapes_dir)
    else:
        root = Path(data.root or "")
    given = getattr(data, f"{part}_images"), getattr(data, f"{part}_annotations")
    found = given if all(given) else root_paths(root, part)
    images, annotations = (Path(mine or usual) for mine, usual in zip(given, found, strict=True))
    if not images.is_dir():
        raise UserError(f"{images} is no folder of images: set --data.root or --data.{part}-images")
    if not annotations.exists():
        raise UserError(f"{annotations} does not exist: set --data.root or --data.{part}-annotations")
    return images, annotations
