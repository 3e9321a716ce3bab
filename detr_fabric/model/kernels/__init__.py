"""Attention fused into Triton kernels, for GPUs. A reader of the core may skip this room: it computes what
attention.py computes by way of all weights, and is used only where it has proved to."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from detr_fabric.model.entmax import Scalar
from detr_fabric.model.kernels.agreement import agreed, fused_alpha, try_kernels

__all__ = ["agreed", "entmax_attention", "fused_alpha", "try_kernels"]


def entmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, alpha: Scalar, dropout: float) -> Tensor:
    """As in fused.py, which is imported only here because it imports Triton; v may be narrower than q and k.

    The kernels know one width: v is filled up with zeros, whose outputs are dropped.
    """
    from detr_fabric.model.kernels import fused

    missing = q.shape[-1] - v.shape[-1]
    if missing == 0:
        return fused.entmax_attention(q, k, v, allowed, alpha, dropout)
    return fused.entmax_attention(q, k, F.pad(v, (0, missing)), allowed, alpha, dropout)[..., :-missing]
