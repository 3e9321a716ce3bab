"""Detections of a model that was trained with focal loss: the best pairs of a query and a class.

Shapes: B batch, Q queries, C classes, K detections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fabric.model.detr import class_scores, post_process


def top_detections(logits: Tensor, boxes: Tensor, sizes: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The K = min(most, Q·C) highest of all scores, as Deformable DETR takes them: a query may find several classes.

    logits (B, Q, C), boxes (B, Q, 4), sizes (B, 2): height and width. Returns scores and labels (B, K), boxes
    (B, K, 4) xyxy in pixels, and the queries (B, K) that found them, by descending score.
    """
    _, _, corners = post_process(logits, boxes, sizes, focal=True)
    scores = class_scores(logits, focal=True).flatten(1)  # (B, Q·C)
    best, place = scores.topk(min(most, scores.shape[1]))
    queries, labels = place.div(logits.shape[-1], rounding_mode="floor"), place % logits.shape[-1]
    return best, labels, torch.take_along_dim(corners, queries[..., None], 1), queries
