"""alpha-entmax and its gradients: mathematics only. Scores, weights and forbidden keys are as in mappings.py.

alpha-entmax (Peters, Niculae & Martins 2019, arXiv 1905.05702, section 3) leads from softmax (alpha = 1) to sparsemax
(alpha = 2). Below 1 every key has a weight; beyond 2, which entmax_wide.py solves, fewer have one than in sparsemax.
With e = alpha - 1 and x the scores of a row less their maximum, the weights p are

    p = t^(1/e),   t = [1 + e (x - lam)]_+,   lam such that sum p = 1.                                              (1)

Solving for lam. The condition in (1) reads |t|_q = 1 with q = 1/e. A norm of clipped affine terms is convex in lam and
falls; at lam = 0 the largest key alone makes it 1. So Newton's method on the norm, started there, climbs to the root
and never passes it: no sort, no bracket. With u = p^(1-e), which is -dp/dlam, s0 = sum p and s1 = sum u, its step is

    lam <- lam + s0 (1 - s0^-e) / (e s1).                                                                           (2)

For e = 1 this is Michelot's rule (1986): finite and exact. For e -> 0 it is lam = log sum exp x: softmax in one step.
For e < 0, t grows with lam and stays above 1. |t|_q is then concave and rises from at most 1, so that the same steps
climb to the root too.
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
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from detr_fabric.config import ALPHAS
from detr_fabric.model.entmax_export import solve_in_few_operations
from detr_fabric.model.entmax_wide import checked, solve_beyond_sparsemax

Scalar = float | Tensor  # one number for all rows, or (..., 1): one number a row

SOFTMAX_BELOW = 1e-9  # |e| below which entmax is softmax: for 4000 keys they differ by less than 1e-7
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

    alpha: in [0.2, 4]; a tensor broadcasts against scores.shape[:-1] + (1,) and receives its gradient. The values of a
    tensor are looked at, which waits for a GPU: entmax_up_to doesn't. Compiled code can't look, and gives NaN instead
    of an error for values outside.
    Raises ValueError for numbers outside and for other shapes.
    """
    if isinstance(alpha, Tensor):
        alpha = checked(alpha, scores)
        wide = torch.compiler.is_compiling() or bool((alpha > 2).any())
        return entmax_up_to(ALPHAS[1] if wide else 2.0, scores, alpha)
    if not ALPHAS[0] <= alpha <= ALPHAS[1]:
        raise ValueError(f"alpha is {alpha}: entmax is defined here for alpha in [{ALPHAS[0]:g}, {ALPHAS[1]:g}]")
    weights: Tensor = _Entmax.apply(scores, alpha, alpha > 2)
    return weights


def entmax_up_to(largest: float, scores: Tensor, alpha: Tensor) -> Tensor:
    """entmax for a tensor alpha that can't leave [0.2, largest]; nothing is looked at."""
    weights: Tensor = _Entmax.apply(scores, alpha, largest > 2)
    return weights


class _Entmax(torch.autograd.Function):
    """Equation (1), with (3) and (4) as its gradient. The gradient is written in differentiable operations of p and
    alpha, and p is this function's own output, so that autograd derives the second derivative.

    wide: alpha may be beyond 2, where everything is computed in float64.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: Scalar, wide: bool) -> Tensor:
        ctx.alpha, ctx.wide = None if isinstance(alpha, Tensor) else alpha, wide
        x = scores.double() if wide else scores
        (p,) = _by_blocks(_solve_any if wide else _solve, _exponent(alpha, x), x)
        p = p.to(scores.dtype)
        ctx.save_for_backward(p, *([alpha] if isinstance(alpha, Tensor) else []))
        return p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
        p, *learned = ctx.saved_tensors
        p, dtype = p.double() if ctx.wide else p, p.dtype
        if ctx.alpha is not None:
            (dx,) = _by_blocks(_gradient, _exponent(ctx.alpha, p), p, g)
            return dx.to(dtype), None, None
        (alpha,) = learned
        dx, dalpha = _by_blocks(_gradients, _exponent(alpha, p), p, g)
        return dx.to(dtype), dalpha.sum_to_size(alpha.shape).to(alpha.dtype), None


def _exponent(alpha: Scalar, scores: Tensor) -> Scalar:
    """e = alpha - 1; of a tensor in the precision of float_(scores), and kept off 0."""
    if isinstance(alpha, Tensor):
        e = (alpha - 1).to(torch.promote_types(scores.dtype, torch.float32))
        return torch.where(e.abs() < SOFTMAX_BELOW, SOFTMAX_BELOW, e)
    return alpha - 1


def _solve_any(e: Scalar, scores: Tensor) -> tuple[Tensor]:
    """p of each row for any e, of float64 scores."""
    x = scores - scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    if not isinstance(e, Tensor):
        return (solve_beyond_sparsemax(e, x),)
    return (torch.where(e > 1, solve_beyond_sparsemax(e.clamp_min(1), x), *_solve(e.clamp_max(1), x)),)


def _solve(e: Scalar, scores: Tensor) -> tuple[Tensor]:
    """p of each row, by steps (2). Autograd does not see this, so it works in place."""
    x = float_(scores)
    x = x - x.amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)  # a row of -inf stays one
    if not isinstance(e, Tensor) and abs(e) < SOFTMAX_BELOW:
        p = x.mul_(1 / math.log(2)).exp2_()
        return (p.div_(p.sum(-1, keepdim=True).clamp_min(TINY)).to(scores.dtype),)

    if torch.compiler.is_exporting():
        return (solve_in_few_operations(e, x).to(scores.dtype),)

    # On the CPU it costs nothing to check whether all rows are done. On a GPU, and when compiled, the number of steps
    # is fixed: the most that any row of up to 4000 keys needed, rows made to be slow among them.
    ask = x.device.type == "cpu" and not torch.compiler.is_compiling()
    steps = 100 if ask else 7 if not isinstance(e, Tensor) and e <= 0.5 else 12
    # The last step d acts on p instead of lam, which leaves errors of the order of d^2 and d^(1/e).
    done = torch.finfo(x.dtype).eps ** (e.clamp_min(2 / 3) if isinstance(e, Tensor) else max(e, 2 / 3))

    x = x.mul_(e)
    shift = torch.full_like(x[..., :1], -1.0 if _is_rational(e) else 0.0)
    for step in range(steps + 1):
        p, u = _powers(e, x, shift)
        s0, s1 = p.sum(-1, keepdim=True), u.sum(-1, keepdim=True).clamp_min_(TINY)
        excess = s0.clamp_min(1)  # below 1 by rounding, or 0 in a row of -inf: nothing to move
        move = excess.log().mul_(-e).expm1_().mul_(excess).div_(s1)  # -e times the step of lam
        if step == steps or (ask and not ((move / e).abs() > done).any()):
            break
        shift -= move
    return (p.addcmul_(u, (1 - s0) / s1).clamp_min_(0).to(scores.dtype),)


def _is_rational(e: Scalar) -> bool:
    """Whether the powers in (1) are products: sparsemax and entmax15."""
    return not isinstance(e, Tensor) and e in (0.5, 1.0)


def _powers(e: Scalar, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """p = t^(1/e) and u = t^(1/e - 1), given e x, and e lam or, where _is_rational, e lam - 1."""
    if _is_rational(e):
        t = (x - shift).clamp_min_(0)
        return (t, t.sign()) if e == 1 else (t * t, t)
    # exp2 and log1p of clamped numbers, because exp, or an input of -inf, is ten times slower on some CPUs.
    t_less_1 = (x - shift).clamp_(-1, torch.finfo(x.dtype).max)  # finite: 0 times infinity is no number
    u = t_less_1.clamp_min(-1 + torch.finfo(x.dtype).eps / 2).log1p_().mul_((1 / e - 1) / math.log(2)).exp2_()
    t = t_less_1.add_(1)
    return t * u, u.mul_(t.sign())


def _gradient(e: Scalar, p: Tensor, g: Tensor) -> tuple[Tensor]:
    """Equation (3)."""
    u = _slope(e, float_(p))
    return ((u * _centered(u, float_(g))).to(p.dtype),)


def _slope(e: Scalar, p: Tensor) -> Tensor:
    """u = p^(1 - e), 0 where p is."""
    if not isinstance(e, Tensor):
        if abs(e) < SOFTMAX_BELOW:
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
    weights = float_(p)
    log_p = weights.clamp_min(TINY).log()
    y = log_p * -e
    exp_y = (y * (1 / math.log(2))).exp2()
    u = weights * exp_y
    h = _centered(u, float_(g))
    v = weights * log_p * log_p * -_remainder(y, exp_y)
    return (u * h).to(p.dtype), (v * h).sum(-1, keepdim=True)


def _remainder(y: Tensor, exp_y: Tensor) -> Tensor:
    """f(y) = (exp(y) - 1 - y) / y^2, for |y| up to 1/2 by its series; beyond, nothing cancels."""
    near, square = y.clamp(-0.5, 0.5), y * y
    series = near / math.factorial(11) + 1 / math.factorial(10)
    for n in range(9, 1, -1):
        series = series * near + 1 / math.factorial(n)
    return torch.where(square > 0.25, (exp_y - 1 - y) / square.clamp_min(0.25), series)


def float_(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def _by_blocks(f: Callable[..., tuple[Tensor, ...]], e: Scalar, *rows: Tensor) -> tuple[Tensor, ...]:
    """f(e, *rows); on the CPU in blocks of rows, so that intermediate results stay in the cache.

    Not in blocks if compiled, because the compiler fuses f, nor if autograd records f, because it keeps them all.
    """
    lead, width = rows[0].shape[:-1], rows[0].shape[-1]
    whole = rows[0].device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled()
    if whole or rows[0].numel() <= BLOCK_SCORES:
        return f(e, *rows)
    size = max(1, BLOCK_SCORES // width)
    blocks = zip(*(torch.split(x.reshape(-1, width), size) for x in rows), strict=True)
    exponents: Iterable[Scalar] = itertools.repeat(e)
    if isinstance(e, Tensor):
        exponents = torch.split(e.expand(*lead, 1).reshape(-1, 1), size)
    out: list[Tensor] = []
    for i, (exponent, block) in enumerate(zip(exponents, blocks, strict=False)):
        results = f(exponent, *block)
        if i == 0:
            out = [x.new_empty(lead.numel(), x.shape[-1]) for x in results]
        for whole_result, result in zip(out, results, strict=True):
            whole_result[i * size : (i + 1) * size] = result
    return tuple(x.view(*lead, -1) for x in out)
