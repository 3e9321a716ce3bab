"""entmax in few operations, for exported graphs: the notation and equation (1) of entmax.py.

The steps of entmax.py stop when every row is done. A graph has no such end: it would repeat the most that any row
needs, which makes it slow to build and to run. For sparsemax and entmax15 the root of (1) has a closed form in the
sorted scores s_1 >= ... >= s_n. With z = e x and tau = e lam - 1, so that p = [z - tau]_+^(1/e), the k largest keys
alone would give

    sparsemax:  tau_k = (sum_{j<=k} s_j - 1) / k                        (Martins & Astudillo 2016, algorithm 1)
    entmax15:   tau_k = mean_k - sqrt(1/k - var_k),  of s_1 to s_k      (Peters et al. 2019, algorithm 2)

and tau is the largest of those tau_k that leave their k-th key a weight. No tau is below -1, where the largest key
alone has weight 1. So scores below -1 need no place of their own, and a row of -inf comes out as 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = float | Tensor  # as in entmax.py

TINY = 1e-30  # stands in for 0 under a fraction bar
STEPS = 8  # of Newton's method for other alphas: rows made to be slow are then within 1e-5


def solve_in_few_operations(e: Scalar, x: Tensor) -> Tensor:
    """p of each row, for e up to 1. x: scores less the maximum of their row; a row of -inf gives 0."""
    if isinstance(e, Tensor):
        e = e.clamp_max(1 - 1e-6)  # so that the power of 0 in u is 0
    elif e in (0.5, 1.0):
        z = (x * e).clamp_min(-1)
        t = (z - _threshold(z, squared=e == 0.5)).clamp_min(0)
        p = t * t if e == 0.5 else t
        return p / p.sum(-1, keepdim=True).clamp_min(TINY)
    z = (x * e).clamp(-1e30, 1e30) + 1
    shift = torch.zeros_like(z[..., :1])
    for _ in range(STEPS):  # equation (2), times e
        p, u = _powers(e, z, shift)
        s0, s1 = p.sum(-1, keepdim=True).clamp_min(1), u.sum(-1, keepdim=True).clamp_min(TINY)
        shift = shift + (s0 - s0 ** (1 - e)) / s1
    p, u = _powers(e, z, shift)
    return (p + u * ((1 - p.sum(-1, keepdim=True)) / u.sum(-1, keepdim=True).clamp_min(TINY))).clamp_min(0)


def _threshold(z: Tensor, squared: bool) -> Tensor:
    """tau, (..., 1); sparsemax's, or entmax15's where weights are squared."""
    ordered = z.sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    if squared:
        mean = ordered.cumsum(-1) / count
        variance = (ordered * ordered).cumsum(-1) / count - mean * mean
        tau = mean - (1 / count - variance).clamp_min(0).sqrt()
    else:
        tau = (ordered.cumsum(-1) - 1) / count
    return torch.where(tau <= ordered, tau, -1.0).amax(-1, keepdim=True).clamp_min(-1)


def _powers(e: Scalar, z: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """p = t^(1/e) and u = t^(1/e - 1)."""
    t = (z - shift).clamp_min(0)
    u = t ** (1 / e - 1)
    return t * u, u
