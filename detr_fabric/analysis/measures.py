"""How sparse an attention map is, and how much of it lies inside a box: pure functions of weights without padding.

Shapes: H heads, T queries, S keys; h×w image tokens; P pairs of a query and a box. A map (H, T, S) has a measure (H,).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.data.batch import Size

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
    """The part of a head's T·S weights that are exactly 0: the mean over rows of #{k: p_k = 0} / S.

    Of single heads, never of their average, which is 0 only where all heads are.
    """
    return (weights == 0).float().mean((1, 2))


def near_zeros(weights: Tensor) -> Tensor:
    """The part of T·S weights of at most NEAR_ZERO, exact zeros included: what softmax, never 0, is compared by."""
    return (weights <= NEAR_ZERO).float().mean((1, 2))


def support(weights: Tensor) -> Tensor:
    """Keys with a weight other than 0, mean over the T rows."""
    return weights.count_nonzero(-1).float().mean(1)


def entropy(weights: Tensor) -> Tensor:
    """-Σ p log p in nats, mean over the T rows. A row that does not sum to 1 is divided by its sum; one of 0 has 0."""
    total = weights.sum(-1, keepdim=True)
    entropies: Tensor = torch.special.entr(weights / total.clamp_min(torch.finfo(weights.dtype).tiny)).sum(-1)
    return entropies.mean(1)


def gini(weights: Tensor) -> Tensor:
    """Gini index of a head's whole map, its T·S weights as one list. 0: all weights are equal; near 1: a few weights
    have everything. Rows without mass count as sparse."""
    return _gini(weights.flatten(1)).to(weights.dtype)


def gini_rows(weights: Tensor) -> Tensor:
    """Gini index of each row, mean over the T rows. A row without mass has 0, as an even one has: heads that leave rows
    empty look less sparse than by `gini`."""
    return _gini(weights.flatten(0, 1)).view(weights.shape[:2]).mean(1).to(weights.dtype)


def _gini(lists: Tensor) -> Tensor:
    """lists (N, K) → (N,): G = 1 - 2 Σ_k (w_(k) / ‖w‖₁) (K - k + ½) / K, w_(1) ≤ … ≤ w_(K) (Hurley & Rickard 2009,
    table I, in [0, 1)); 0 for a list of zeros. Computed in float64."""
    flat = lists.detach()
    # NumPy sorts floats several times as fast as torch does on a CPU.
    rising = (flat.sort(-1).values if flat.is_cuda else torch.from_numpy(np.sort(flat.numpy(), -1))).double()
    n = flat.shape[1]
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=flat.device)
    total = rising.sum(-1)
    return torch.where(total > 0, 1 - 2 * (rising @ (n - rank + 0.5)) / (n * total), 0.0)


def cover(boxes: Tensor, h: int, w: int) -> Tensor:
    """boxes (P, 4) cxcywh in [0, 1] → (P, h·w): the part of each feature cell's area that the box covers, exactly.

    The h×w cells divide the image without padding evenly. A box beyond the image covers what is inside of it.
    """
    left, top, right, bottom = cxcywh_to_xyxy(boxes)[:, None].unbind(-1)  # (P, 1) each
    return (_overlap(top, bottom, h)[:, :, None] * _overlap(left, right, w)[:, None, :]).flatten(1)


def _overlap(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Sides from low to high, (P, 1) in [0, 1] → (P, cells): the part of each of `cells` equal cells inside of them."""
    start = torch.arange(cells, device=low.device)
    return (torch.minimum(high * cells, start + 1) - torch.maximum(low * cells, start)).clamp(0, 1)


def share_inside(weights: Tensor, covered: Tensor) -> Tensor:
    """weights (H, P, S), covered (P, S) → (H, P): the part of a row's mass inside its box; 0 for a row without mass.

    Of the cross-attention of matched queries this is PAIBB, the part of attention inside the bounding box. A cell's
    weight counts as spread evenly over the cell, so even attention scores the box's part of the image.
    """
    return (weights * covered).sum(-1) / weights.sum(-1).clamp_min(torch.finfo(weights.dtype).tiny)


def share_inside_enlarged(weights: Tensor, boxes: Tensor, cells: Size, pixels: Size) -> Tensor:
    """weights (P, h·w), boxes (P, 4) cxcywh in [0, 1] → (P,): the part of each row inside its box once the row, as a
    map of h×w cells, is enlarged bilinearly (F.interpolate, align_corners=False) to H×W pixels; 0 for a row without
    mass.

    Of matched queries and the last layer's head-averaged cross-attention this is PAIBB as a thesis on sparse DETR
    defines it: Σ_{pixels in the true box} M / Σ_{all pixels} M. Pixels that the box cuts count by their part inside.
    Enlarging blurs a map by a cell, so objects smaller than a cell lose mass that `share_inside` leaves with them.

    The enlarged map is E_h M E_wᵀ, and the box is an outer product too, so no enlarged map is made.
    """
    left, top, right, bottom = cxcywh_to_xyxy(boxes)[:, None].unbind(-1)  # (P, 1) each
    (h, w), (height, width) = cells, pixels
    down, across = _enlarge(h, height, weights), _enlarge(w, width, weights)  # (h, H), (w, W)
    covered = (_overlap(top, bottom, height) @ down.T)[:, :, None] * (_overlap(left, right, width) @ across.T)[:, None]
    everything = (down.sum(1)[:, None] * across.sum(1)).flatten()  # (S,)
    return (weights * covered.flatten(1)).sum(-1) / (weights @ everything).clamp_min(torch.finfo(weights.dtype).tiny)


def _enlarge(cells: int, pixels: int, like: Tensor) -> Tensor:
    """(cells, pixels): how much of each cell's value each pixel of the enlarged line gets."""
    lines = torch.eye(cells, dtype=like.dtype, device=like.device)[:, None]  # (cells, 1, cells)
    return F.interpolate(lines, size=pixels, mode="linear", align_corners=False)[:, 0]
