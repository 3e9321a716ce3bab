"""How much of the training batches will be padding, said before training."""

from __future__ import annotations

import random

import numpy as np

from detr_fabric.data.loader import TrainLoader
from detr_fabric.data.padding import PaddingShare, padding_of
from detr_fabric.data.sampler import epoch_order, group_by_shape

ESTIMATED = 4096  # images from which the share of padding is estimated


def padding_summary(loader: TrainLoader) -> str:
    """How much of the training batches is padding, and what would lower it."""
    grouped = loader.data.group_by_shape
    padding, otherwise = (estimate_padding(loader, group) for group in (grouped, not grouped))
    if padding is None or otherwise is None:
        return "unknown, because most annotations don't give the sizes of images"
    text = f"about {padding.share:.0%} of the pixels of training batches"
    if loader.data.max_batch_pixels is not None:
        text += f", of which {padding.split:.0%} are split (--data.max-batch-pixels)"
    if grouped:
        return f"{text}; {otherwise.share:.0%} without --data.group-by-shape"
    if padding.share - otherwise.share < 0.02:
        return text
    return (
        f"{text}; {otherwise.share:.0%} with --data.group-by-shape; a smaller --train.batch-size with more "
        "--train.accumulate lowers it too"
    )


def estimate_padding(loader: TrainLoader, grouped: bool) -> PaddingShare | None:
    """The padding of the first epoch, grouped by shape or not, from up to ESTIMATED images without reading their files.
    None if the annotations give fewer than half of the sizes."""
    dataset, batch_size, data = loader.dataset, loader.batch_size, loader.data
    known = np.flatnonzero((dataset.annotations.sizes > 0).all(1)).tolist()
    if 2 * len(known) < len(dataset):
        return None
    sizes = [dataset.size((0, index)) for index in known[:: -(-len(known) // ESTIMATED)]]
    global_batch = min(loader.global_batch, len(sizes))
    order = epoch_order(len(sizes), dataset.seed, 0)[: len(sizes) // global_batch * global_batch]
    if grouped:
        order = group_by_shape(order, sizes, global_batch, random.Random(dataset.seed))
    batches = [
        [sizes[index] for index in order[start : start + batch_size]] for start in range(0, len(order), batch_size)
    ]
    return padding_of(batches, data.max_batch_pixels, data.pad_multiple)
