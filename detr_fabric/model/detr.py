"""DETR: backbone → transformer → a class and a box for each query (Carion et al. 2020, figure 2).

Shapes: B batch, H×W image, h×w features, D width, L decoder layers, Q queries, C classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.model.backbone import Backbone
from detr_fabric.model.position import LearnedPosition, SinePosition
from detr_fabric.model.transformer import Transformer


class DETROutput(NamedTuple):
    """Predictions after every decoder layer: the last are the result, the others have auxiliary losses."""

    pred_logits: Tensor  # (L, B, Q, C+1), the last class is "no object"; (L, B, Q, C) with focal loss
    pred_boxes: Tensor  # (L, B, Q, 4) cxcywh in [0, 1]


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x).relu()
        out: Tensor = last(x)
        return out


class DETR(nn.Module):
    """The detector. Its parameters and buffers have the original's names, so that the original's checkpoints load."""

    def __init__(
        self,
        backbone: Backbone,
        position: SinePosition | LearnedPosition,
        transformer: Transformer,
        dim: int,
        num_classes: int,
        num_queries: int,
        focal: bool = False,
    ) -> None:
        super().__init__()
        self.focal = focal  # loss.kind
        self.transformer = transformer
        self.class_embed = nn.Linear(dim, num_classes + (not focal))
        if focal:  # every class begins at a probability of 0.01 (Lin et al. 2017, section 4.1)
            nn.init.constant_(self.class_embed.bias, -math.log(0.99 / 0.01))
        self.bbox_embed = MLP(dim, dim, 4, 3)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.input_proj = nn.Conv2d(backbone.num_channels, dim, kernel_size=1)
        self.backbone = nn.Sequential(backbone, position)

    def forward(self, images: Tensor, mask: Tensor) -> DETROutput:
        """images (B, 3, H, W) normalised, zero on padding; mask (B, H, W) bool, True on padding."""
        backbone, position = self.backbone
        features, mask = backbone(images, mask)
        pos = position(mask).to(features.dtype)
        src = self.input_proj(features)  # (B, D, h, w)
        src, pos = (x.flatten(2).transpose(1, 2) for x in (src, pos))  # (B, h·w, D)
        hs = self.transformer(src, mask, self.query_embed.weight, pos)  # (L, B, Q, D)
        with torch.autocast(hs.device.type, enabled=False):  # the heads compute in float32, also in mixed precision
            hs = hs.to(self.class_embed.weight.dtype)
            return DETROutput(self.class_embed(hs), self.boxes(hs))

    def boxes(self, hs: Tensor) -> Tensor:
        """Decoded queries (L, B, Q, D) → boxes (L, B, Q, 4) cxcywh in [0, 1]."""
        boxes: Tensor = self.bbox_embed(hs).sigmoid()
        return boxes


def class_scores(logits: Tensor, focal: bool) -> Tensor:
    """Class probabilities (..., C): a softmax over C and "no object", or with focal loss a sigmoid of each class."""
    return logits.sigmoid() if focal else logits.softmax(-1)[..., :-1]


def post_process(logits: Tensor, boxes: Tensor, sizes: Tensor, focal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Turns predictions into detections. logits (B, Q, C+1), or C with focal loss; boxes
    (B, Q, 4); sizes (B, 2): height and width.

    Returns scores (B, Q) and labels (B, Q) of the best class but "no object", and boxes (B, Q, 4) xyxy in pixels.
    """
    scores, labels = class_scores(logits, focal).max(-1)
    scale = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)  # (B, 1, 4): width, height, width, height
    return scores, labels, cxcywh_to_xyxy(boxes) * scale
