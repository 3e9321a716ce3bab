"""Whether a GPU uses the fused kernels: only where they have agreed with the plain computation on that very GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from detr_fabric.config import AttnConfig, CrossMapping
from detr_fabric.model.entmax import Scalar, entmax

WIDTHS = (16, 32, 64)  # of a head
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of q, by precision
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}  # of a norm, relative

FUSED: set[CrossMapping] = {"sparsemax", "entmax15", "entmax", "entmax-learned"}

_agreed: set[tuple[torch.device, torch.dtype, int]] = set()


def agreed(q: Tensor) -> bool:
    """Whether q's device, dtype and head width have passed `try_kernels`. torch.compile writes kernels of its own."""
    return not torch.compiler.is_compiling() and (q.device, q.dtype, q.shape[-1]) in _agreed


def fused_alpha(mapping: CrossMapping, attn: AttnConfig, learned: dict[str, Tensor]) -> Scalar | None:
    """The exponent by which the kernels compute a mapping, a learned one as (H,); None: they do not."""
    low, high = attn.alpha_range
    alphas: dict[CrossMapping, Scalar | None] = {
        "sparsemax": 2.0,
        "entmax15": 1.5,
        "entmax": attn.alpha if 1 <= attn.alpha <= 2 else None,
        "entmax-learned": learned.get("alpha") if low >= 1 and high <= 2 else None,
    }
    return alphas.get(mapping)


def try_kernels(attn: AttnConfig, device: torch.device, precision: str, width: int, heads: int = 2) -> list[str]:
    """Compares the kernels that these settings need with the plain computation, and says so in a line; none where no
    kernel is needed. What does not agree, or does not run, is not used afterwards.

    width: of a head.
    """
    start = {"alpha": torch.full((heads,), attn.alpha, device=device)}
    found = (fused_alpha(mapping, attn, start) for mapping in dict.fromkeys(attn.mappings))
    alphas = [alpha for alpha in found if alpha is not None]
    if not attn.fused or not alphas:
        return []
    if width not in WIDTHS:
        return [f"attn    no fused kernel: heads are {width} wide, and it needs 16, 32 or 64"]
    began, dtype = time.perf_counter(), DTYPES[precision]
    try:
        errors = [error for alpha in alphas for error in differences(alpha, device, dtype, width, heads)]
    except Exception as error:  # of a compiler, a driver or a card that nobody has tried: training goes on without
        what = (str(error).splitlines() or [""])[0][:200]
        return [f"attn    no fused kernel, for it does not run here: {type(error).__name__}: {what}"]
    seconds = time.perf_counter() - began
    worst = float(torch.tensor(errors).max())  # NaN if there is one
    if not worst <= TOLERANCE[dtype]:
        return [f"attn    no fused kernel, for it differs by {worst:.0e} from the plain computation on this device"]
    _agreed.add((device, dtype, width))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    agrees = f"which agrees with the plain computation on {name} to {worst:.0e} ({seconds:.1f} s)"
    return [f"attn    fused kernel for heads {width} wide, {agrees}"]


def differences(alpha: Scalar, device: torch.device, dtype: torch.dtype, width: int, heads: int = 2) -> Iterator[float]:
    """Norms of what the kernels err by, relative to those of the plain computation in float64: of the output and of
    every gradient, under padding, with few and many queries; and of dropout, whose weights have to be its own."""
    from detr_fabric.model.kernels.fused import entmax_attention  # imports Triton

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    some = torch.rand(2, 70, generator=generator).to(device) < 0.8
    some[1, -30:] = False
    for queries, allowed in ((20, None), (150, some)):
        q, k, v, g = (draw(2, heads, n, width) for n in (queries, 70, 70, queries))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        if isinstance(alpha, Tensor):
            inputs.append(alpha.detach().clone().requires_grad_())
        exact = [x.detach().double().requires_grad_() for x in inputs]
        out = entmax_attention(q, k, v, allowed, inputs[3] if len(inputs) > 3 else alpha)
        expected = plain_attention(exact[0], exact[1], exact[2], allowed, exact[3] if len(exact) > 3 else alpha)
        pairs = [(out, expected)]
        pairs += zip(torch.autograd.grad(out, inputs, g), torch.autograd.grad(expected, exact, g.double()), strict=True)
        yield from (float((a.detach() - b.detach()).norm() / b.detach().norm()) for a, b in pairs)

    # With the identity as values, the output is the weights: each is dropped or doubled, half of them, and the backward
    # pass drops the same ones.
    for queries, allowed in ((20, None), (150, some[:1, :width])):
        q, k, g = (draw(1, heads, n, width) for n in (queries, width, queries))
        v = torch.eye(width).expand(1, heads, -1, -1).to(device, dtype).requires_grad_()
        whole = entmax_attention(q, k, v, allowed, alpha).detach().double()
        dropped = entmax_attention(q, k, v, allowed, alpha, 0.5)
        (dv,) = torch.autograd.grad(dropped, v, g)
        dropped = dropped.detach().double()
        kept = dropped > 0
        yield float((dropped - 2 * whole * kept).norm() / whole.norm())
        yield 0.0 if 0.3 < kept.sum() / (whole > 0).sum() < 0.7 else 1.0
        expected = dropped.transpose(-1, -2) @ g.double()
        yield float((dv - expected).norm() / expected.norm())


def plain_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, alpha: Scalar) -> Tensor:
    """The same by way of the matrix of weights. alpha: a number, or (H,)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None, None, :], -torch.inf)
    return entmax(scores, alpha[:, None, None] if isinstance(alpha, Tensor) else alpha) @ v
