"""DETR: backbone → transformer → a class and a box for each query (Carion et al. 2020, figure 2).

Shapes: B batch, H×W image, h×w features, D width, L decoder layers, Q queries, C classes.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.config import AttnConfig, Mapping, ModelConfig
from detr_fabric.model.attention import Attention
from detr_fabric.model.backbone import Backbone, load_backbone_weights
from detr_fabric.model.position import LearnedPosition, SinePosition
from detr_fabric.model.transformer import Transformer


class DETROutput(NamedTuple):
    """Predictions after every decoder layer; the last is the answer, the others train it (auxiliary losses)."""

    pred_logits: Tensor  # (L, B, Q, C+1), the last class is "no object"
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
        return last(x)


class DETR(nn.Module):
    """The detector. Names of parameters and buffers are those of the original, so its checkpoints load."""

    def __init__(
        self,
        backbone: Backbone,
        position: SinePosition | LearnedPosition,
        transformer: Transformer,
        dim: int,
        num_classes: int,
        num_queries: int,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.class_embed = nn.Linear(dim, num_classes + 1)
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
        tokens = [x.flatten(2).transpose(1, 2) for x in (src, pos)]  # (B, h·w, D)
        hs, _ = self.transformer(tokens[0], mask.flatten(1), self.query_embed.weight, tokens[1])  # (L, B, Q, D)
        with torch.autocast(hs.device.type, enabled=False):  # under mixed precision the heads answer in float32
            hs = hs.to(self.class_embed.weight.dtype)
            return DETROutput(self.class_embed(hs), self.bbox_embed(hs).sigmoid())


def post_process(logits: Tensor, boxes: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's logits (B, Q, C+1) and boxes (B, Q, 4), image sizes (B, 2) as (height, width).

    Returns scores (B, Q) and labels (B, Q) of the best class that is an object, and boxes (B, Q, 4) xyxy in pixels.
    """
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    scale = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)  # (B, 1, 4): width, height, width, height
    return scores, labels, cxcywh_to_xyxy(boxes) * scale


def freeze(model: DETR, parts: tuple[str, ...]) -> None:
    """Stops training of the named parts (config.Part)."""
    body = "backbone.0.body"
    modules = {
        "stem": (f"{body}.conv1", f"{body}.bn1"),
        "backbone": (body,),
        "input-proj": ("input_proj",),
        "encoder": ("transformer.encoder",),
        "decoder": ("transformer.decoder", "query_embed"),
        "heads": ("class_embed", "bbox_embed"),
    }
    for part in parts:
        for name in modules.get(part, (f"{body}.{part}",)):
            model.get_submodule(name).requires_grad_(False)


def build_model(model: ModelConfig, attn: AttnConfig, num_classes: int, pretrained: bool = True) -> DETR:
    """The model of a resolved config; `pretrained` False leaves the backbone's weights to a checkpoint."""

    def site(mapping: Mapping | None) -> partial[Attention]:
        kind = mapping or attn.kind
        return partial(Attention, model.hidden_dim, model.heads, kind, attn.alpha, attn.topk, model.dropout)

    backbone = Backbone(
        model.backbone, model.last_stage, model.dilation, model.norm == "frozen", model.gradient_checkpointing
    )
    if pretrained and model.backbone_weights != "none":
        assert model.backbone_weights is not None, "build_model takes a resolved config"
        load_backbone_weights(backbone.body, model.backbone, model.backbone_weights)
    detr = DETR(
        backbone,
        (SinePosition if model.position == "sine" else LearnedPosition)(model.hidden_dim),
        Transformer(
            site(attn.encoder_self),
            site(attn.decoder_self),
            site(attn.decoder_cross),
            model.hidden_dim,
            model.enc_layers,
            model.dec_layers,
            model.dim_feedforward,
            model.dropout,
            model.pre_norm,
            model.gradient_checkpointing,
        ),
        model.hidden_dim,
        num_classes,
        model.num_queries,
    )
    freeze(detr, model.freeze or ())
    return detr
