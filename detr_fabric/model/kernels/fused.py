"""The kernels of triton_entmax.py as one differentiable function. Importing this imports Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from detr_fabric.model.entmax import SOFTMAX_BELOW, Scalar
from detr_fabric.model.kernels import triton_entmax

STEPS = 40  # of Newton; it ends by itself after 2 to 10
POWERS = {2.0: 2, 1.5: 1}  # alphas whose powers are products


class Blocks(NamedTuple):
    """Rows of queries and of keys that a program works on at a time, and its warps of 32 threads."""

    queries: int
    keys: int
    warps: int


# More queries at a time read the keys less often; with few of them, smaller blocks keep more of the GPU busy. float32
# takes twice the registers and shared memory. Chosen so that at most 16 bytes a thread spill on sm_80, sm_86 and sm_90;
# never timed.
MANY = {
    "solve": Blocks(256, 32, 8),
    "attend": Blocks(128, 32, 8),
    "query_gradient": Blocks(128, 32, 8),
    "key_gradient": Blocks(64, 64, 8),
}
FEW = {
    "solve": Blocks(32, 64, 4),
    "attend": Blocks(32, 32, 4),
    "query_gradient": Blocks(32, 32, 4),
    "key_gradient": Blocks(32, 32, 4),
}
FLOAT32 = {
    "solve": Blocks(128, 32, 8),
    "attend": Blocks(64, 32, 8),
    "query_gradient": Blocks(64, 32, 8),
    "key_gradient": Blocks(32, 64, 8),
}


def blocks(queries: int, dtype: torch.dtype) -> dict[str, Blocks]:
    """What each kernel works on at a time."""
    return FLOAT32 if dtype == torch.float32 else FEW if queries <= 128 else MANY


def entmax_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, alpha: Scalar, dropout: float = 0.0
) -> Tensor:
    """dropout(entmax_alpha(q kᵀ / sqrt(D))) v for every head, without a (T, S) matrix in memory.

    q: (B, H, T, D), k and v: (B, H, S, D), all of one dtype, D a power of two from 16 on.
    allowed: (B, S) bool, False on padding; an image without keys gives 0. None: everything is allowed.
    alpha: in [1, 2]; or (H,), one a head, which receives its gradient.
    dropout: probability that a weight is dropped; drawn from torch's generator of the device.

    Scores and weights are float32. Returns (B, H, T, D) in q's dtype. Has a first derivative only.
    """
    power = 0 if isinstance(alpha, Tensor) else POWERS.get(alpha, 0)
    e = alpha - 1 if isinstance(alpha, Tensor) else torch.full((q.shape[1],), alpha - 1, device=q.device)
    seed = torch.randint(2**31 - 1, (1,), device=q.device) if dropout > 0 else None
    # (B, T, H, D) is how the linear layers in front have it, so that contiguous() copies nothing
    by_token = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out: Tensor = _Attention.apply(*by_token, allowed, e.float(), power, dropout, seed)
    return out.transpose(1, 2)


class _Attention(torch.autograd.Function):
    """Tensors are (B, T or S, H, D), e is (H,)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        allowed: Tensor | None,
        e: Tensor,
        power: int,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        (batch, queries, heads, width), keys = q.shape, k.shape[1]
        ctx.learned = ctx.needs_input_grad[4]
        e = e.detach().clamp_min(SOFTMAX_BELOW)
        allowed = None if allowed is None else allowed.contiguous()
        row = e.new_empty(4, batch, heads, queries)
        top, shift, rest, mass = row
        out, under_u = torch.empty_like(q), torch.empty_like(q, dtype=torch.float32)
        given = _given(q, allowed, e, seed)
        sizes = (queries, keys, heads, width**-0.5)
        block = blocks(queries, q.dtype)
        with torch.cuda.device_of(q):
            use = block["solve"]
            triton_entmax.solve[_grid(queries, use.queries, batch * heads)](
                q, k, given[0], e, top, shift, *sizes, width, power, allowed is not None, STEPS, *use[:2],
                num_warps=use.warps,
            )  # fmt: skip
            use = block["attend"]
            triton_entmax.attend[_grid(queries, use.queries, batch * heads)](
                q, k, v, *given, top, shift, rest, mass, out, under_u, *sizes, dropout,
                width, power, allowed is not None, dropout > 0, *use[:2], num_warps=use.warps,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, allowed, e, seed, row, under_u)
        ctx.power, ctx.dropout = power, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, allowed, e, seed, row, under_u = ctx.saved_tensors
        (batch, queries, heads, width), keys = q.shape, k.shape[1]
        g, power = g.contiguous(), ctx.power
        top, shift, rest, mass = row
        mean, dalpha = torch.empty_like(top), torch.empty_like(top) if ctx.learned else top
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        given = _given(q, allowed, e, seed)
        sizes = (queries, keys, heads, width**-0.5, ctx.dropout)
        how = (width, power, allowed is not None, ctx.dropout > 0)
        block = blocks(queries, q.dtype)
        with torch.cuda.device_of(q):
            use = block["query_gradient"]
            triton_entmax.query_gradient[_grid(queries, use.queries, batch * heads)](
                q, k, v, *given, top, shift, rest, mass, under_u, g, mean, dq, dalpha, *sizes,
                *how, ctx.learned, *use[:2], num_warps=use.warps,
            )  # fmt: skip
            use = block["key_gradient"]
            triton_entmax.key_gradient[_grid(keys, use.keys, batch * heads)](
                q, k, v, *given, top, shift, rest, mean, g, dk, dv, *sizes, *how, *use[:2], num_warps=use.warps
            )  # fmt: skip
        return dq, dk, dv, None, dalpha.sum((0, 2)) if ctx.learned else None, None, None, None


def _given(q: Tensor, allowed: Tensor | None, e: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Padding, e and seed for a kernel; what is None is not read, but an address has to be there."""
    return q if allowed is None else allowed, e, e if seed is None else seed


def _grid(tokens: int, block: int, heads: int) -> tuple[int, int]:
    return triton.cdiv(tokens, block), heads
