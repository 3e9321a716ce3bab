"""Loaders with the settings that matter to a test, and comparisons of what they return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from detr_fabric.config import COCO_SCALES, Config, DataConfig
from detr_fabric.data.batch import MicroBatch
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import Annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.loader import EvalLoader, TrainLoader
from detr_fabric.data.sampler import Shard
from detr_fabric.data.transforms import TrainTransform, Transform

COCO = TrainTransform(COCO_SCALES, 1333, 0.5, crop=True)


def resolved(**settings: Any) -> DataConfig:
    """Data settings with the defaults that depend on other settings filled in."""
    return Config(data=DataConfig(**settings)).resolve().data


def train_loader(
    dataset: CocoDetection,
    batch: int = 2,
    accumulate: int = 2,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
    **data: Any,
) -> TrainLoader:
    """data: fields of DataConfig; without workers unless they are given."""
    config, shard = DataConfig(**{"workers": 0, **data}), Shard(rank, world)
    return TrainLoader(dataset, batch_size=batch, accumulate=accumulate, data=config, shard=shard, pin=pin)


def eval_loader(dataset: CocoDetection, batch: int = 1, rank: int = 0, world: int = 1, workers: int = 0) -> EvalLoader:
    return EvalLoader(dataset, batch_size=batch, data=DataConfig(workers=workers), shard=Shard(rank, world))


def assert_same(first: list[list[MicroBatch]], second: list[list[MicroBatch]]) -> None:
    assert len(first) == len(second)
    for step_a, step_b in zip(first, second, strict=True):
        for (images_a, targets_a), (images_b, targets_b) in zip(step_a, step_b, strict=True):
            assert torch.equal(images_a.images, images_b.images) and torch.equal(images_a.mask, images_b.mask)
            for a, b in zip(targets_a, targets_b, strict=True):
                assert torch.equal(a.labels, b.labels) and torch.equal(a.boxes, b.boxes) and a[2:] == b[2:]


def ids(steps: list[list[MicroBatch]]) -> list[int | str]:
    return [target.image_id for step in steps for _, targets in step for target in targets]


def sized(sizes: list[tuple[int, int]], transform: Transform = COCO) -> CocoDetection:
    """A data set of which nothing but the sizes is known."""
    n = len(sizes)
    none = np.zeros(0)
    ids, names = np.arange(n), np.full(n, "none.png")
    table = Annotations(
        Categories((1,), ("thing",), "contiguous"),
        ids,
        names,
        np.array(sizes).reshape(n, 2),
        np.zeros(n, dtype=bool),
        np.zeros(n + 1, dtype=np.int64),
        none.reshape(0, 4),
        none,
        none.astype(bool),
        none,
    )
    return CocoDetection(Path("nowhere"), table, transform, seed=3)
