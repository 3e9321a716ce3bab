"""The running statistics of trained batch norms, so that a step that is left out leaves no trace in them."""

from __future__ import annotations

from torch import nn


class BatchStatistics:
    """A copy of the running statistics of a model's trained batch norms, which every forward pass moves."""

    def __init__(self, model: nn.Module) -> None:
        norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        self._now = [buffer for norm in norms for buffer in norm.buffers()]
        self._before = [buffer.clone() for buffer in self._now]

    def restore(self) -> None:
        """Sets the model's statistics back to the copy."""
        for now, before in zip(self._now, self._before, strict=True):
            now.copy_(before)
