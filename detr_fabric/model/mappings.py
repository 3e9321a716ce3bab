"""Mappings from attention scores to attention weights: mathematics only.

Every mapping takes scores (..., S) and returns weights of the same shape and dtype, computed in float32 (float64 stays
float64). A score of -inf forbids its key: the weight is exactly 0. A row that forbids every key is all 0.

alpha-entmax (Peters, Niculae & Martins 2019, arXiv 1905.05702, section 3) leads from softmax (alpha = 1) to sparsemax
(alpha = 2). With e = alpha - 1 and x the scores of a row less their maximum, the weights p are

    p = t^(1/e),   t = [1 + e (x - lam)]_+,   lam such that sum p = 1.                                              (1)

Solving for lam. The condition in (1) reads |t|_q = 1 with q = 1/e. A norm of clipped affine terms is convex in lam and
falls; at lam = 0 the largest key alone makes it 1. So Newton's method on the norm, started there, climbs to the root
and never passes it: no sort, no bracket. With u = p^(1-e), which is -dp/dlam, s0 = sum p and s1 = sum u, its step is

    lam <- lam + s0 (1 - s0^-e) / (e s1).                                                                           (2)

For e = 1 this is Michelot's rule (1986): finite and exact. For e -> 0 it is lam = log sum exp x: softmax in one step.
The last step acts on p itself, p - u (s0 - 1) / s1: the rounding of lam is common to all keys and would show in sum p.

Gradients need p alone. For a gradient g of the weights, from (1) and d(sum p) = 0 (for alpha: Correia, Niculae &
Martins 2019, arXiv 1909.00015, proposition 1):

    h = g - (sum u g) / (sum u),   dx = u h,                                                                        (3)
    dalpha = sum v h,   v = dp/de at fixed lam = -p l^2 f(-e l),   l = log p,   f(y) = (exp(y) - 1 - y) / y^2.      (4)

(4) equals the published formula and stays exact as alpha -> 1, where that one subtracts equals and divides by e^2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Scalar = float | Tensor  # one for all rows, or (..., 1): one a row

SOFTMAX_BELOW = 1e-9  # e below which entmax is softmax: for 4000 keys they differ by less than 1e-7
TINY = 1e-30  # stands in for 0 under a logarithm or a fraction bar
BLOCK_SCORES = 1 << 18  # a block of rows and what is computed from it stay in the cache; measured


def softmax(scores: Tensor) -> Tensor:
    """exp(x) / sum exp(x)."""
    return entmax(scores, 1.0)


def sparsemax(scores: Tensor) -> Tensor:
    """The point of the simplex nearest to each row of scores (Martins & Astudillo 2016)."""
    return entmax(scores, 2.0)


def entmax15(scores: Tensor) -> Tensor:
    """entmax with alpha = 1.5 (Peters, Niculae & Martins 2019)."""
    return entmax(scores, 1.5)


def entmax(scores: Tensor, alpha: Scalar) -> Tensor:
    """alpha-entmax of each row, equation (1).

    alpha: in [1, 2]; a tensor broadcasts against scores.shape[:-1] + (1,) and receives its gradient.
    Raises ValueError for a number outside [1, 2]; the values of a tensor are not looked at.
    """
    if not isinstance(alpha, Tensor) and not 1 <= alpha <= 2:
        raise ValueError(f"alpha is {alpha}: entmax is defined here for alpha in [1, 2]")
    weights: Tensor = _Entmax.apply(scores, alpha)
    return weights


def sigmoid(scores: Tensor) -> Tensor:
    """sigmoid(x - log n), n the number of keys allowed in the row (Ramapuram et al. 2024): keys do not compete."""
    x = _float(scores)
    allowed = (x > -math.inf).sum(-1, keepdim=True).clamp_min(1)
    return torch.sigmoid(x - allowed.log()).to(scores.dtype)


def relu(scores: Tensor) -> Tensor:
    """[x]_+ / sum [x]_+; a row without a positive score is all 0."""
    positive = _float(scores).relu()
    return (positive / positive.sum(-1, keepdim=True).clamp_min(1e-6)).to(scores.dtype)


def softmax1(scores: Tensor) -> Tensor:
    """exp(x) / (1 + sum exp(x)) (Miller 2023, "Attention is off by one"): softmax beside a key of score 0, left out."""
    return softmax(torch.cat((scores, torch.zeros_like(scores[..., :1])), -1))[..., :-1]


def topk(scores: Tensor, k: int) -> Tensor:
    """softmax over the k largest scores of each row (Gupta et al. 2021); all scores that equal the k-th stay."""
    kth = scores.detach().topk(min(k, scores.shape[-1]), -1).values[..., -1:]
    return softmax(scores.masked_fill(scores < kth, -math.inf))


class _Entmax(torch.autograd.Function):
    """Equation (1), with (3) and (4) as its gradient. The gradient is written in differentiable operations of p and
    alpha, and p is this function's own output, so that autograd derives the second derivative."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: Scalar) -> Tensor:
        (p,) = _by_blocks(_solve, _exponent(alpha, scores), scores)
        ctx.alpha = None if isinstance(alpha, Tensor) else alpha
        ctx.save_for_backward(p, *([alpha] if isinstance(alpha, Tensor) else []))
        return p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None]:
        if ctx.alpha is not None:
            (p,) = ctx.saved_tensors
            (dx,) = _by_blocks(_gradient, _exponent(ctx.alpha, p), p, g)
            return dx, None
        p, alpha = ctx.saved_tensors
        dx, dalpha = _by_blocks(_gradients, _exponent(alpha, p), p, g)
        return dx, dalpha.sum_to_size(alpha.shape).to(alpha.dtype)


def _exponent(alpha: Scalar, scores: Tensor) -> Scalar:
    """e = alpha - 1; of a tensor in the precision of _float(scores), and kept off 0."""
    if isinstance(alpha, Tensor):
        return (alpha - 1).to(torch.promote_types(scores.dtype, torch.float32)).clamp_min(SOFTMAX_BELOW)
    return alpha - 1


def _solve(e: Scalar, scores: Tensor) -> tuple[Tensor]:
    """p of each row, by steps (2). No gradient passes here, so it works in place."""
    x = _float(scores)
    x = x - x.amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)  # a row of -inf stays one
    if not isinstance(e, Tensor) and e < SOFTMAX_BELOW:
        p = x.mul_(1 / math.log(2)).exp2_()
        return (p.div_(p.sum(-1, keepdim=True).clamp_min(TINY)).to(scores.dtype),)

    # On the CPU it costs nothing to ask the rows whether they are done. Elsewhere, and compiled, the number of steps is
    # fixed: as many as rows of up to 4000 keys needed that were searched for to need many.
    ask = x.device.type == "cpu" and not torch.compiler.is_compiling()
    steps = 100 if ask else 7 if not isinstance(e, Tensor) and e <= 0.5 else 12
    # Taking a last step d on p instead of lam leaves errors of the order of d^2 and d^(1/e).
    done = torch.finfo(x.dtype).eps ** (e.clamp_min(2 / 3) if isinstance(e, Tensor) else max(e, 2 / 3)) * -e

    x = x.mul_(e)
    shift = torch.full_like(x[..., :1], -1.0 if _is_rational(e) else 0.0)
    for step in range(steps + 1):
        p, u = _powers(e, x, shift)
        s0, s1 = p.sum(-1, keepdim=True), u.sum(-1, keepdim=True).clamp_min_(TINY)
        excess = s0.clamp_min(1)  # below 1 by rounding, or 0 in a row of -inf: nothing to move
        move = excess.log().mul_(-e).expm1_().mul_(excess).div_(s1)  # -e times the step of lam
        if step == steps or (ask and not (move < done).any()):
            break
        shift -= move
    return (p.addcmul_(u, (1 - s0) / s1).clamp_min_(0).to(scores.dtype),)


def _is_rational(e: Scalar) -> bool:
    """Whether the powers in (1) are plain arithmetic: sparsemax and entmax15."""
    return not isinstance(e, Tensor) and e in (0.5, 1.0)


def _powers(e: Scalar, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """p = t^(1/e) and u = t^(1/e - 1), given e x, and e lam or, where _is_rational, e lam - 1."""
    if _is_rational(e):
        t = (x - shift).clamp_min_(0)
        return (t, t.sign()) if e == 1 else (t * t, t)
    # exp2 and log1p of clamped numbers: with exp, or where -inf comes in, some CPUs are ten times slower.
    t_less_1 = (x - shift).clamp_min_(-1)
    u = t_less_1.clamp_min(-1 + torch.finfo(x.dtype).eps / 2).log1p_().mul_((1 / e - 1) / math.log(2)).exp2_()
    t = t_less_1.add_(1)
    return t * u, u.mul_(t.sign())


def _gradient(e: Scalar, p: Tensor, g: Tensor) -> tuple[Tensor]:
    """Equation (3)."""
    u = _slope(e, _float(p))
    return ((u * _centered(u, _float(g))).to(p.dtype),)


def _slope(e: Scalar, p: Tensor) -> Tensor:
    """u = p^(1 - e), 0 where p is."""
    if not isinstance(e, Tensor):
        if e < SOFTMAX_BELOW:
            return p
        if e == 1:
            return p.sign()
        if e == 0.5:
            return p * p.clamp_min(TINY).rsqrt()  # the sqrt of zeros is slow on some CPUs
    return p * (p.clamp_min(TINY).log2() * -e).exp2()


def _centered(u: Tensor, g: Tensor) -> Tensor:
    """h = g - (sum u g) / (sum u)."""
    return g - (u * g).sum(-1, keepdim=True) / u.sum(-1, keepdim=True).clamp_min(TINY)


def _gradients(e: Tensor, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Equations (3) and (4), the latter (..., 1)."""
    weights = _float(p)
    log_p = weights.clamp_min(TINY).log()
    y = log_p * -e
    exp_y = (y * (1 / math.log(2))).exp2()
    u = weights * exp_y
    h = _centered(u, _float(g))
    v = weights * log_p * log_p * -_remainder(y, exp_y)
    return (u * h).to(p.dtype), (v * h).sum(-1, keepdim=True)


def _remainder(y: Tensor, exp_y: Tensor) -> Tensor:
    """f(y) = (exp(y) - 1 - y) / y^2 for y >= 0: by its series up to 1/2, as written beyond, where nothing cancels."""
    near, far = y.clamp_max(0.5), y.clamp_min(0.5)
    series = near / math.factorial(11) + 1 / math.factorial(10)
    for n in range(9, 1, -1):
        series = series * near + 1 / math.factorial(n)
    at_half = (math.expm1(0.5) - 0.5) / 0.25
    return series + ((exp_y.clamp_min(math.exp(0.5)) - 1 - far) / (far * far) - at_half)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_blocks(f: Callable[..., tuple[Tensor, ...]], e: Scalar, *rows: Tensor) -> tuple[Tensor, ...]:
    """f(e, *rows); on the CPU in blocks of rows, so that what f computes on the way stays in the cache.

    Where f is compiled it is fused, and where its own gradient is asked for all of it must be kept: then it runs whole.
    """
    lead, width = rows[0].shape[:-1], rows[0].shape[-1]
    whole = rows[0].device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled()
    if whole or rows[0].numel() <= BLOCK_SCORES:
        return f(e, *rows)
    size = max(1, BLOCK_SCORES // width)
    blocks = zip(*(x.reshape(-1, width).split(size) for x in rows), strict=True)
    exponents = e.expand(*lead, 1).reshape(-1, 1).split(size) if isinstance(e, Tensor) else itertools.repeat(e)
    out: list[Tensor] = []
    for i, (exponent, block) in enumerate(zip(exponents, blocks, strict=False)):
        results = f(exponent, *block)
        if i == 0:
            out = [x.new_empty(lead.numel(), x.shape[-1]) for x in results]
        for whole_result, result in zip(out, results, strict=True):
            whole_result[i * size : (i + 1) * size] = result
    return tuple(x.view(*lead, -1) for x in out)
