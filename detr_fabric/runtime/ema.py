"""A moving average of the weights (--optim.ema), which is evaluated in the place of the weights that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """The exponential moving average of a model's weights (Polyak & Juditsky, 1992).

    After optimizer step t, from 1: average = d * average + (1 - d) * weights, with d = min(decay, (1 + t) / (10 + t)).
    This warm-up of the decay is that of TensorFlow's tf.train.ExponentialMovingAverage (num_updates): early on, the
    average reaches back about a tenth of the steps so far, and so forgets the random weights of the start.

    The running statistics of batch norm are averaged like weights, because they belong to them; the number of batches
    that they have seen is copied. What is frozen stays as it is, to the last bit. Nothing else is needed for a resumed
    run to go on with the same average: t is the number of the step.

    Every rank has its own, of the same weights. Only batch norm's statistics differ, in which rank 0 counts: DDP hands
    its buffers to the others before each forward pass, in evaluation too.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """It starts as the weights that the model has now, on their device."""
        self.decay = decay
        self._weights: dict[str, Tensor] = model.state_dict()  # the model's own tensors, not copies
        self.average = {name: value.clone() for name, value in self._weights.items()}  # as a state dict

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step`, which counts from 1."""
        names = [name for name, value in self._weights.items() if value.is_floating_point()]
        average, weights = ([tensors[name] for name in names] for tensors in (self.average, self._weights))
        get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))(average, weights, None)
        for name in self._weights.keys() - names:
            self.average[name].copy_(self._weights[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the model has the average and `average` the weights, in the same memory: a compiled model stays
        compiled, and no second model is needed."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weights in self._weights.items():
            before = weights.clone()
            weights.copy_(self.average[name])
            self.average[name].copy_(before)


def to_evaluate(ema: EMA | None) -> AbstractContextManager[None]:
    """Within it the model has the weights that a run evaluates: the average, where it has one."""
    return nullcontext() if ema is None else ema.swapped()
