"""Where a feature stands in the image: sine or learned position encodings.

Shapes: B batch, D width, h×w features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detr_fabric.errors import UserError


class SinePosition(nn.Module):
    """Sines and cosines of the position within the unpadded image (Carion et al. 2020, A.4; Parmar et al. 2018)."""

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, mask: Tensor) -> Tensor:
        """mask (B, h, w), True on padding → (B, D, h, w): D/2 channels of y, then D/2 of x."""
        inside = ~mask
        y = inside.cumsum(1).float()  # integers: cumsum of floats has no deterministic algorithm on a GPU
        x = inside.cumsum(2).float()
        y = y / (y[:, -1:, :] + 1e-6)
        x = x / (x[:, :, -1:] + 1e-6)
        return sines(torch.stack((y, x), -1), self.dim).permute(0, 3, 1, 2)


def sines(points: Tensor, dim: int) -> Tensor:
    """Points (..., 2), y and x in [0, 1] of the image → (..., D): sines and cosines in turn, D/2 of y, then of x."""
    half = dim // 2
    channel = torch.arange(0, half, 2, dtype=torch.float32, device=points.device)
    angles = points[..., None] * (2 * math.pi) / 10000 ** (channel / half)  # (..., 2, D/4)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-3)


class LearnedPosition(nn.Module):
    """A learned vector per row and per column, up to 50 of each."""

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(50, dim // 2)
        self.col_embed = nn.Embedding(50, dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """mask (B, h, w) → (B, D, h, w): D/2 channels of x, then D/2 of y. Raises UserError beyond 50 × 50."""
        b, h, w = mask.shape
        if max(h, w) > 50:
            raise UserError(
                f"learned positions reach 50 × 50 features, but these are {h} × {w}: "
                "use --model.position sine, smaller --data.scales, or no --model.dilation"
            )
        x = self.col_embed.weight[:w].expand(h, w, -1)
        y = self.row_embed.weight[:h, None].expand(h, w, -1)
        return torch.cat([x, y], -1).permute(2, 0, 1).expand(b, -1, -1, -1)
