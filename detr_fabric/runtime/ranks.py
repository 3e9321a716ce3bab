"""What ranks tell each other: a tensor reduced over all of them, or one object of each.

`Fabric.all_reduce` puts a barrier in front, which makes the host wait for the GPU; these do not. Every rank must call.
With one rank nothing is sent.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum."""
    return _reduced(values, dist.ReduceOp.SUM)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The elementwise mean of floating-point values."""
    total = sum_over_ranks(values)
    return total / dist.get_world_size() if dist.is_initialized() else total


def max_over_ranks(values: Tensor) -> Tensor:
    """The elementwise maximum."""
    return _reduced(values, dist.ReduceOp.MAX)


def of_every_rank(value: T) -> list[T]:
    """Each rank's value, which must be picklable, by rank."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def _reduced(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if not dist.is_initialized():
        return values
    result = values.clone()
    dist.all_reduce(result, operation)
    return result
