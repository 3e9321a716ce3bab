"""alpha-entmax beyond sparsemax, 2 < alpha <= 4: the notation and equation (1) of entmax.py, solved by a bracket.

For e = alpha - 1 > 1 the norm of entmax.py is not convex, so its Newton steps may pass the root. Here the unknown is m,
the weight of the largest key. With x the scores of a row of n keys less their maximum, equation (1) reads

    p = [m^e + e x]_+^(1/e),   sum p = 1,

where sum p rises with m. At m = 1/n it is at most 1, because no weight is larger than m. At m = 1 it is at least 1.
With t = p^e, d(sum p)/dm = m^(e-1) sum p/t over t > 0. Newton's step is taken where it stays inside this bracket and
the step before has at least halved the error; else the bracket is halved.

All is computed in float64, because the power 1/e < 1 magnifies rounding: at alpha = 4, a change of t by 1e-16 can move
a weight near 0 by 5e-6, and one by the 6e-8 of float32 by 4e-3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fabric.config import ALPHAS

Scalar = float | Tensor  # as in entmax.py

EPS = torch.finfo(torch.float64).eps
TINY = 1e-300  # stands in for 0 under a fraction bar
STEPS = 60  # rows of up to 4000 keys, those made to be slow among them, needed at most 28
EXPORTED_STEPS = 20  # in a graph, which each step makes longer


def solve_beyond_sparsemax(e: Scalar, x: Tensor) -> Tensor:
    """p of each row, for e in [1, 3]. x: float64 scores less the maximum of their row; a row of -inf gives 0."""
    x = e * x
    low = torch.full_like(x[..., :1], 1 / x.shape[-1])
    high = torch.ones_like(low)
    m, last = high, torch.full_like(high, torch.inf)
    steps = EXPORTED_STEPS if torch.compiler.is_exporting() else STEPS
    for step in range(1, steps + 1):
        t = (m**e + x).clamp_min_(0)
        p = t ** (1 / e)
        excess = p.sum(-1, keepdim=True) - 1
        slope = m ** (e - 1) * (p / t.clamp_min_(TINY)).sum(-1, keepdim=True)
        newton = m - excess / slope.clamp_min_(1)
        unsolved = (excess > -1) & (excess.abs() > 8 * EPS) & ((newton - m).abs() > 2 * EPS * m)  # -1: a row of -inf
        if step == steps or (x.device.type == "cpu" and not torch.compiler.is_compiling() and not unsolved.any()):
            break
        low, high = torch.where(excess < 0, m, low), torch.where(excess < 0, high, m)
        trusted = (newton >= low) & (newton <= high) & (excess.abs() < last / 2)
        last = excess.abs()
        m = torch.where(unsolved, torch.where(trusted, newton, (low + high) / 2), m)
    return p / (1 + excess).clamp_min_(TINY)


def checked(alpha: Tensor, scores: Tensor) -> Tensor:
    """alpha, if there is one number in ALPHAS for every row of scores (..., S).

    Raises ValueError otherwise. A compiler can't look at the values: there, numbers outside ALPHAS become NaN.
    """
    rows = (*scores.shape[:-1], 1)
    try:
        fits = torch.broadcast_shapes(alpha.shape, rows) == rows
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"alpha has shape {tuple(alpha.shape)}, which does not broadcast to {rows}: one number a row")
    outside = ~((alpha >= ALPHAS[0]) & (alpha <= ALPHAS[1]))  # true of NaN
    if torch.compiler.is_compiling():
        return alpha.masked_fill(outside, torch.nan)
    if outside.any():
        raise ValueError(f"alpha holds {alpha[outside][0].item():g}: it lies in [{ALPHAS[0]:g}, {ALPHAS[1]:g}]")
    return alpha
