"""Which image goes to which step and rank: pure functions of (seed, epoch, position, rank, world)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from detr_fabric.data.batch import Size
from detr_fabric.data.padding import bucket_key
from detr_fabric.errors import UserError

SampleKey = tuple[int, int]
"""(epoch, index of the image): all that the data set needs to know, so that workers hold no changing state."""

WINDOW = 1024  # neighbours in the shuffled order among which images of similar shape are grouped
GROUP = 8  # largest number of images of similar shape in a row, so that a large step still mixes shapes


class Shard(NamedTuple):
    """Which share of the images is this process's."""

    rank: int
    world: int


WHOLE = Shard(rank=0, world=1)


def steps_per_epoch(num_images: int, batch_size: int, accumulate: int, world: int) -> int:
    """Optimizer steps in an epoch; the last incomplete global batch is dropped, as in the original.

    Raises UserError if the images do not fill a single global batch.
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
    shard: Shard,
    skip: int = 0,
    sizes: Sequence[Size] | None = None,
) -> list[list[list[SampleKey]]]:
    """This rank's samples of one epoch, without the first `skip` steps: [step][micro-batch][image].

    The permutation depends only on (seed, epoch) and is cut into global batches before it is divided among ranks and
    micro-batches. So every split of the same world * accumulate * batch_size sees the same images in each step.

    sizes: given if images of similar shape should share a micro-batch. The micro-batches of a step are then shuffled
    among the ranks. Otherwise the same rank would always get the smallest images, which would bias what it measures
    alone, such as batch statistics.
    """
    steps = steps_per_epoch(num_images, batch_size, accumulate, shard.world)
    global_batch = shard.world * accumulate * batch_size
    order = epoch_order(num_images, seed, epoch)[: steps * global_batch]
    if sizes is not None:
        order = group_by_shape(order, sizes, global_batch, random.Random(f"shapes-{seed}-{epoch}"))
    batches = []
    for step in range(skip, steps):
        images = order[step * global_batch : (step + 1) * global_batch]
        micro = [images[start : start + batch_size] for start in range(0, global_batch, batch_size)]
        if sizes is not None:
            random.Random(f"ranks-{seed}-{epoch}-{step}").shuffle(micro)
        mine = micro[shard.rank * accumulate : (shard.rank + 1) * accumulate]
        batches.append([[(epoch, index) for index in samples] for samples in mine])
    return batches


def group_by_shape(order: list[int], sizes: Sequence[Size], global_batch: int, rng: random.Random) -> list[int]:
    """The same images reordered: each window is sorted by shape and cut into groups, and every global batch takes some
    groups at random. Depends on the size of the global batch only, not on how ranks and micro-batches divide it."""
    window = max(1, WINDOW // global_batch) * global_batch
    group = max(size for size in range(1, GROUP + 1) if global_batch % size == 0)
    per_step = global_batch // group
    grouped = []
    for start in range(0, len(order), window):
        by_shape = sorted(order[start : start + window], key=lambda index: bucket_key(sizes[index]))
        firsts = list(range(0, len(by_shape), group))
        rng.shuffle(firsts)
        for step in range(0, len(firsts), per_step):
            for first in sorted(firsts[step : step + per_step]):
                grouped += by_shape[first : first + group]
    return grouped


def eval_batches(order: Sequence[int], batch_size: int, shard: Shard) -> list[list[int]]:
    """The batches that a rank evaluates; neighbouring batches go to the ranks in turn.

    Every rank gets the same number of batches, of the same sizes. If world does not divide the number of images, the
    last image is repeated; evaluation drops the duplicates by image id.
    """
    per_rank = -(-len(order) // shard.world)
    batches = []
    for start in range(0, per_rank, batch_size):
        size = min(batch_size, per_rank - start)
        first = start * shard.world + shard.rank * size
        batches.append([order[min(place, len(order) - 1)] for place in range(first, first + size)])
    return batches
