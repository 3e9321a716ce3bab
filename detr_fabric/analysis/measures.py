"""How sparse an attention map is, and how much of it lies inside a box: pure functions of weights without padding.

Shapes: H heads, T queries, S keys; h×w image tokens; P pairs of a query and a box. A map (H, T, S) has a measure (H,).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from detr_fabric.boxes import cxcywh_to_xyxy

NEAR_ZERO = 1e-6  # legends of the pictures name it too


def crop_padding(weights: Tensor, mask: Tensor, queries_too: bool) -> list[Tensor]:
    """weights (B, H, T, h·w), mask (B, h, w) True on padding → each image's (H, T', h'·w'), without padded keys.

    queries_too: of the encoder's self-attention, whose queries are image tokens as well. Padding is right and below.
    """
    h, w = mask.shape[-2:]
    heights = (~mask[:, :, 0]).sum(1).tolist()
    widths = (~mask[:, 0, :]).sum(1).tolist()
    cropped = []
    for image, rows, columns in zip(weights, heights, widths, strict=True):
        image = image.unflatten(-1, (h, w))[..., :rows, :columns].flatten(-2)
        if queries_too:
            image = image.unflatten(1, (h, w))[:, :rows, :columns].flatten(1, 2)
        cropped.append(image)
    return cropped


def zeros(weights: Tensor) -> Tensor:
    """The part of all T·S weights that are exactly 0."""
    return (weights == 0).float().mean((1, 2))


def near_zeros(weights: Tensor) -> Tensor:
    """The part of all T·S weights below NEAR_ZERO, exact zeros included: what softmax, never 0, is compared by."""
    return (weights < NEAR_ZERO).float().mean((1, 2))


def support(weights: Tensor) -> Tensor:
    """Keys with a weight other than 0, mean over the T rows."""
    return weights.count_nonzero(-1).float().mean(1)


def entropy(weights: Tensor) -> Tensor:
    """-Σ p log p in nats, mean over the T rows. A row that does not sum to 1 is divided by its sum; one of 0 has 0."""
    total = weights.sum(-1, keepdim=True)
    return torch.special.entr(weights / total.clamp_min(torch.finfo(weights.dtype).tiny)).sum(-1).mean(1)


def gini(weights: Tensor) -> Tensor:
    """Gini index of a head's whole map, its T·S weights as one list (Hurley & Rickard 2009, table I, in [0, 1)).

    0: all weights are equal; near 1: a few weights have everything. Means over rows would make nothing of rows that
    differ in mass.
    """
    flat = weights.detach().flatten(1)  # (H, N)
    # NumPy sorts floats several times as fast as torch does on a CPU.
    rising = flat.sort(-1).values if flat.is_cuda else torch.from_numpy(np.sort(flat.numpy(), -1))
    n = flat.shape[1]
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=flat.device)
    rising = rising.double()
    total = rising.sum(-1)
    index = 2 * (rising @ rank) / (n * total) - (n + 1) / n
    return torch.where(total > 0, index, 0.0).to(weights.dtype)


def cover(boxes: Tensor, h: int, w: int) -> Tensor:
    """boxes (P, 4) cxcywh in [0, 1] → (P, h·w): the part of each feature cell's area that the box covers, exactly.

    The h×w cells divide the image without padding evenly. A box beyond the image covers what is inside of it.
    """
    left, top, right, bottom = cxcywh_to_xyxy(boxes)[:, None].unbind(-1)  # (P, 1) each

    def overlap(low: Tensor, high: Tensor, cells: int) -> Tensor:
        start = torch.arange(cells, device=boxes.device)
        return (torch.minimum(high * cells, start + 1) - torch.maximum(low * cells, start)).clamp(0, 1)  # (P, cells)

    return (overlap(top, bottom, h)[:, :, None] * overlap(left, right, w)[:, None, :]).flatten(1)


def share_inside(weights: Tensor, covered: Tensor) -> Tensor:
    """weights (H, P, S), covered (P, S) → (H, P): the part of a row's mass inside its box; 0 for a row without mass.

    Of the cross-attention of matched queries this is PAIBB, the part of attention inside the bounding box. A cell's
    weight counts as spread evenly over the cell, so even attention scores the box's part of the image.
    """
    return (weights * covered).sum(-1) / weights.sum(-1).clamp_min(torch.finfo(weights.dtype).tiny)
