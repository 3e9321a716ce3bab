"""TVmax: sparse weights on a grid of keys that like to be equal to their neighbours (Martins et al. 2020, arXiv
2002.05556). With z the scores of one query on an h x w grid, lam >= 0, and i ~ j over neighbours, the weights are

    p = argmin over the simplex of  1/2 |p - z|^2 + lam sum_{i~j} |p_i - p_j| = sparsemax(x),
    x = argmin of  1/2 |x - z|^2 + lam sum_{i~j} |x_i - x_j|.

x comes from its dual: x = z - D'u, where D takes differences along edges and |u| <= lam. Accelerated projected gradient
with step 1/8 (Beck & Teboulle 2009), restarted where momentum points uphill (O'Donoghue & Candes 2015), for all rows at
once. Rows leave when their duality gap lam |Dp|_1 - <u, Dp>, which bounds 1/2 |p - p*|^2, is small enough.

Gradient: sparsemax's on the support, then its mean over each connected region of equal weight. A score of -inf forbids
its cell: no edge leads there, so that each image has its own grid without its padding.

Shapes: rows (..., S), S = h·w; grids (R, h, w), R rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detr_fabric.model.entmax import sparsemax

GAP = 5e-12  # so that no weight is off by more than sqrt(2 GAP) = 3e-6
EQUAL = 1e-5  # neighbours that differ by less are one region
CHECK_EVERY, MOST_STEPS = 20, 5000  # steps: beyond, the best found is taken


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of steps depends on the scores
def tvmax(scores: Tensor, grid: tuple[int, int] | None, strength: float) -> Tensor:
    """Weights (..., S) of scores (..., S) on a grid of height and width; strength: lam. A row of -inf is all 0."""
    assert grid is not None and scores.shape[-1] == math.prod(grid), (scores.shape, grid)
    weights: Tensor = _TVmax.apply(scores, grid, strength)
    return weights


class _TVmax(torch.autograd.Function):
    """Solved in float64: the gap of float32 numbers would be rounding alone."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, size: tuple[int, int], strength: float) -> Tensor:
        grid = scores.reshape(-1, *size).double()
        p = solve(grid, strength)
        ctx.save_for_backward(p.flatten(1) > 0, _regions(p).flatten(1).int())
        return p.view_as(scores).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        support, region = ctx.saved_tensors
        rows, region = g.reshape(support.shape).double() * support, region.long()
        rows = (rows - rows.sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp_min(1)) * support
        total = torch.zeros_like(rows).scatter_add_(-1, region, rows)
        count = torch.zeros_like(rows).scatter_add_(-1, region, torch.ones_like(rows))
        return (total / count.clamp_min(1)).gather(-1, region).view_as(g).to(g.dtype), None, None


def solve(grid: Tensor, strength: float) -> Tensor:
    """Weights (R, h, w) of float64 scores (R, h, w)."""
    allowed = grid > -math.inf
    p = torch.zeros_like(grid)
    left = torch.arange(len(grid), device=grid.device)  # rows that are not done
    z = grid.masked_fill(~allowed, 0)
    bounds = [edge * strength for edge in (allowed[:, 1:] & allowed[:, :-1], allowed[..., 1:] & allowed[..., :-1])]
    duals = [torch.zeros_like(bound) for bound in bounds]
    ahead, t = duals, torch.ones_like(z[:, :1, :1])
    for step in range(MOST_STEPS + 1):
        if step % CHECK_EVERY == 0:
            x = (z - _adjoint(*duals)).masked_fill(~allowed, -math.inf)
            now = sparsemax(x.flatten(1)).view_as(x)
            pairs = zip(_differences(now), duals, bounds, strict=True)
            gap = sum(((bound * d.abs() - u * d).flatten(1).sum(-1) for d, u, bound in pairs), torch.zeros(()))
            p[left] = now
            more = gap > GAP
            if step == MOST_STEPS or not more.any():
                return p
            if not more.all():
                left, z, allowed, t = left[more], z[more], allowed[more], t[more]
                bounds, duals, ahead = ([a[more] for a in arrays] for arrays in (bounds, duals, ahead))
        slopes = _differences(z - _adjoint(*ahead))
        new = [(a + d / 8).clamp(-b, b) for a, d, b in zip(ahead, slopes, bounds, strict=True)]
        triples = list(zip(ahead, new, duals, strict=True))
        uphill = sum((((a - n) * (n - u)).flatten(1).sum(-1) for a, n, u in triples), torch.zeros(())) > 0
        t = torch.where(uphill[:, None, None], 1.0, t)
        t_new = (1 + (1 + 4 * t * t).sqrt()) / 2
        ahead = [n + (t - 1) / t_new * (n - u) for _, n, u in triples]
        duals, t = new, t_new
    raise AssertionError("the loop returns")


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """D: of each cell and the one above it (R, h-1, w), and the one to its left (R, h, w-1)."""
    return x[:, 1:] - x[:, :-1], x[..., 1:] - x[..., :-1]


def _adjoint(down: Tensor, right: Tensor) -> Tensor:
    """D' of edge values."""
    pad = torch.nn.functional.pad
    return pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1)) + pad(right, (1, 0)) - pad(right, (0, 1))


def _regions(p: Tensor) -> Tensor:
    """For each cell the smallest index of a cell in its connected region of equal weight; (R, h, w)."""
    joined = [d.abs() < EQUAL for d in _differences(p)]
    above, before = p[:, 1:] * p[:, :-1] > 0, p[..., 1:] * p[..., :-1] > 0
    down, right = joined[0] & above, joined[1] & before
    index = torch.arange(p[0].numel(), device=p.device).view_as(p[:1]).expand(p.shape).clone()
    while True:
        old = index.clone()
        for edge, one, other in (
            (down, index[:, :-1], index[:, 1:]),
            (right, index[..., :-1], index[..., 1:]),
        ):
            least = torch.where(edge, torch.minimum(one, other), one)
            one.copy_(least)
            other.copy_(torch.where(edge, torch.minimum(one, other), other))
        if torch.equal(index, old):
            return index
