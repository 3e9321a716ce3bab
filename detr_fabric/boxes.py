"""Box formats and overlaps. All boxes are (..., 4); generalised IoU is Rezatofighi et al. 2019."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre, width, height → (..., 4) left, top, right, bottom."""
    centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return torch.cat([centre - half, centre + half], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) left, top, right, bottom → (..., 4) centre, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def area(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy → (...)."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return width * height


def iou_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union area of xyxy boxes whose leading dimensions broadcast."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    inside = _area_between(low, high)
    union = area(a) + area(b) - inside
    return inside / union, union


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU in [-1, 1] of xyxy boxes whose leading dimensions broadcast."""
    iou, union = iou_and_union(a, b)
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = _area_between(low, high)
    return iou - (hull - union) / hull


def _area_between(low: Tensor, high: Tensor) -> Tensor:
    """Area (...) of the boxes between these corners (..., 2); 0 where high does not lie above low in both."""
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height  # prod's backward pass would make the host wait for a GPU
