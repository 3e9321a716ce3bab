"""Which image goes to which step and rank: pure functions of (seed, epoch, position, rank, world)."""

from __future__ import annotations

import random

from detr_fabric.errors import UserError

Sample = tuple[int, int]  # (epoch, index): what the data set needs to know, so that workers hold no changing state


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


def step_batches(
    num_images: int, seed: int, epoch: int, batch_size: int, accumulate: int, rank: int, world: int, skip: int = 0
) -> list[list[list[Sample]]]:
    """This rank's samples of one epoch: [step][micro-batch][image], without the first `skip` steps.

    The permutation depends on (seed, epoch) only and is cut into global batches before ranks and micro-batches, so
    every split of the same world * accumulate * batch_size sees the same images in each step.
    """
    steps = steps_per_epoch(num_images, batch_size, accumulate, world)
    order = list(range(num_images))
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    per_rank = accumulate * batch_size
    batches = []
    for step in range(skip, steps):
        first = (step * world + rank) * per_rank
        mine = [(epoch, index) for index in order[first : first + per_rank]]
        batches.append([mine[start : start + batch_size] for start in range(0, per_rank, batch_size)])
    return batches


def shard(num_images: int, rank: int, world: int) -> list[int]:
    """Images that a rank evaluates: every world-th one, equally many on every rank.

    Where world does not divide num_images the first images are repeated; duplicates are dropped by image id later.
    """
    per_rank = -(-num_images // world)
    return [(rank + step * world) % num_images for step in range(per_rank)]
