"""Which keys are padding, in the forms that attention takes. Made once a forward pass, for all blocks together.

Shapes: B batch, S keys, h×w their grid.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16  # numbers at whose multiples CUDA's kernel wants rows to start; it copies others in every call


class Padding(NamedTuple):
    """An image without keys attends to all of its padding, so that no kernel sees an empty row, until its heads are set
    to 0."""

    allowed: Tensor  # (B, S) bool, False on padding
    bias: Tensor  # (B, 1, 1, S) to be added to scores: 0, or -inf on padding
    no_key: Tensor  # (B, 1, 1, 1) bool: the image has no key
    grid: tuple[int, int] | None  # height and width of the keys

    @classmethod
    def of(cls, mask: Tensor, dtype: torch.dtype) -> Padding:
        """mask (B, S) or (B, h, w) bool, True on padding; dtype: of queries and keys, which the bias has to have."""
        grid = (mask.shape[1], mask.shape[2]) if mask.dim() == 3 else None
        padding = mask.flatten(1)
        batch, keys = padding.shape
        no_key = padding.all(-1, keepdim=True)
        padding = padding & ~no_key
        aligned = keys if torch.compiler.is_compiling() else -(-keys // ALIGNMENT) * ALIGNMENT
        rows = torch.zeros(batch, aligned, dtype=dtype, device=mask.device)
        bias = rows[:, :keys].masked_fill_(padding, -math.inf)
        return cls(~padding, bias[:, None, None], no_key[:, :, None, None], grid)
