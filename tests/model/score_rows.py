"""Rows of attention scores as hypothesis draws them."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def rows(draw: st.DrawFn, few: int, most: int) -> Tensor:
    """Rows of 1 to `most` scores, half of them of up to `few`, of many shapes and scales, with ties, dominant keys and
    forbidden keys."""
    n = draw(st.one_of(st.integers(1, few), st.integers(1, most)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    normal, uniform = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
    kinds = {
        "normal": normal,
        "heavy": normal / (uniform + 1e-3),
        "ties": (3 * uniform).floor(),
        "constant": normal[:1].expand(n).clone(),
        "dominant": normal + 8 * (torch.arange(n) == n // 2),
        "many magnitudes": -(10 ** (-6 * uniform)),
    }
    row = kinds[draw(st.sampled_from(sorted(kinds)))] * 10 ** draw(st.floats(-3, 2))
    forbidden = torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.2, 0.9, 1.0]))
    return row.masked_fill(forbidden, -math.inf)
