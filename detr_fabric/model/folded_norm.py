"""Frozen batch norm inside the convolution before it, which saves two passes over each of the backbone's outputs.

What a norm does to its channels is computed anew in every forward pass, for all norms of a backbone in nine operations:
so it follows whatever changes the statistics, and costs nothing worth a cache that could be out of date.

Shapes: C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import FrozenBatchNorm2d


class FoldedNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
    """A frozen batch norm that only keeps its statistics; the convolution before it applies them."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class NormedConv(nn.Conv2d):
    """A convolution that applies the frozen batch norm behind it too, which saves two passes over its output."""

    norm: tuple[FoldedNorm]  # in a tuple, so that the state dict lists its buffers only once
    scale: Tensor  # (C,) by which the norm multiplies its channels, and
    shift: Tensor  # (C,) which it adds, as of this forward pass

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, Scaled.apply(self.weight, self.scale, x.dtype), self.shift)
        return out


class Scaled(torch.autograd.Function):
    """Weights times a constant factor for each output channel, cast in the same kernel."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        scale = scale[:, None, None, None]
        ctx.save_for_backward(scale)
        return torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g * ctx.saved_tensors[0], None, None


def fold_norms(body: nn.Module) -> tuple[NormedConv, ...]:
    """Makes every convolution of a ResNet apply the FoldedNorm that is registered after it, in place; returns them."""
    convs = [m for m in body.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in body.modules() if isinstance(m, FoldedNorm)]
    for conv, norm in zip(convs, norms, strict=True):
        assert conv.bias is None and conv.out_channels == norm.weight.numel()
        conv.__class__ = NormedConv  # torchvision's blocks offer no way to choose the class
        assert isinstance(conv, NormedConv)
        conv.norm = (norm,)
    return tuple(conv for conv in convs if isinstance(conv, NormedConv))


def set_scales_and_shifts(convs: Sequence[NormedConv], dtype: torch.dtype) -> None:
    """Computes what every convolution's norm does to its channels; of all at once, because each is tiny.

    dtype: of the images, in which the shifts are added.
    """
    if not convs:
        return
    norms = [conv.norm[0] for conv in convs]
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (torch.cat([norm.get_buffer(name) for norm in norms]) for name in names)
    scale = weight * (var + norms[0].eps).rsqrt()
    shift = (bias - mean * scale).to(dtype)
    channels = [conv.out_channels for conv in convs]
    for conv, its_scale, its_shift in zip(convs, scale.split(channels), shift.split(channels), strict=True):
        conv.scale, conv.shift = its_scale, its_shift
