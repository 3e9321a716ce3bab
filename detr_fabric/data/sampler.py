"""Which image goes to which step and rank: pure functions of (seed, epoch, position, rank, world)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from detr_fabric.data.padding import Shape, likeness
from detr_fabric.errors import UserError

Sample = tuple[int, int]  # (epoch, index): what the data set needs to know, so that workers hold no changing state

WINDOW = 1024  # images, next to each other in the shuffled order, among which like shapes are sought
CELL = 8  # most images of like shape that a step takes together: a large step still mixes shapes


def steps_per_epoch(num_images: int, batch_size: int, accumulate: int, world: int) -> int:
    """Optimizer steps in an epoch; the last incomplete global batch is dropped, as in the original.

    Raises UserError when the images do not fill a single global batch.
    """
    global_batch = world * accumulate * batch_size
    if num_images < global_batch:
        raise UserError(
            f"{num_images} training images do not fill one global batch of {global_batch} ({world} ranks x "
            f"{accumulate} accumulated x {batch_size} images): lower --train.batch-size or --train.accumulate"
        )
    return num_images // global_batch


def epoch_order(num_images: int, seed: int, epoch: int) -> list[int]:
    """The permutation of all images in an epoch."""
    order = list(range(num_images))
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    return order


def step_batches(
    num_images: int,
    seed: int,
    epoch: int,
    batch_size: int,
    accumulate: int,
    rank: int,
    world: int,
    skip: int = 0,
    shapes: Mapping[int, Shape] | None = None,
) -> list[list[list[Sample]]]:
    """This rank's samples of one epoch: [step][micro-batch][image], without the first `skip` steps.

    The permutation depends on (seed, epoch) only and is cut into global batches before ranks and micro-batches, so
    every split of the same world * accumulate * batch_size sees the same images in each step. shapes: of every image,
    if images of like shape are to share a micro-batch. Which rank gets which is drawn anew in each step then: the same
    one would always get the smallest, which would bias what a rank measures alone, such as batch statistics.
    """
    steps = steps_per_epoch(num_images, batch_size, accumulate, world)
    global_batch = world * accumulate * batch_size
    order = epoch_order(num_images, seed, epoch)[: steps * global_batch]
    if shapes is not None:
        order = like_shapes_together(order, shapes, global_batch, random.Random(f"shapes-{seed}-{epoch}"))
    batches = []
    for step in range(skip, steps):
        images = order[step * global_batch : (step + 1) * global_batch]
        micro = [images[start : start + batch_size] for start in range(0, global_batch, batch_size)]
        if shapes is not None:
            random.Random(f"ranks-{seed}-{epoch}-{step}").shuffle(micro)
        mine = micro[rank * accumulate : (rank + 1) * accumulate]
        batches.append([[(epoch, index) for index in samples] for samples in mine])
    return batches


def like_shapes_together(
    order: list[int], shapes: Mapping[int, Shape], global_batch: int, rng: random.Random
) -> list[int]:
    """The same images, in global batches made of cells of like shape: a window of the order is sorted by shape and cut
    into cells, and each global batch takes some at random. Nothing but the size of the global batch matters, so ranks
    and micro-batches may divide it as they like."""
    window = max(1, WINDOW // global_batch) * global_batch
    cell = max(size for size in range(1, CELL + 1) if global_batch % size == 0)
    per_step = global_batch // cell
    grouped = []
    for start in range(0, len(order), window):
        by_shape = sorted(order[start : start + window], key=lambda index: likeness(shapes[index]))
        cells = list(range(0, len(by_shape), cell))
        rng.shuffle(cells)
        for first in range(0, len(cells), per_step):
            for place in sorted(cells[first : first + per_step]):
                grouped += by_shape[place : place + cell]
    return grouped


def eval_batches(order: Sequence[int], batch_size: int, rank: int, world: int) -> list[list[int]]:
    """The batches that a rank evaluates, equally many of the same sizes on every rank: the ranks take neighbouring
    batches in turn.

    Where world does not divide the images the last one is repeated; duplicates are dropped by image id later.
    """
    per_rank = -(-len(order) // world)
    batches = []
    for start in range(0, per_rank, batch_size):
        size = min(batch_size, per_rank - start)
        first = start * world + rank * size
        batches.append([order[min(place, len(order) - 1)] for place in range(first, first + size)])
    return batches
