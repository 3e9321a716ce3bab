"""From a config to a DETR: the parts, put together."""

from __future__ import annotations

from detr_fabric.config import AttnConfig, ModelConfig
from detr_fabric.model.backbone import Backbone
from detr_fabric.model.conditional import ConditionalDecoder, ConditionalDETR, start_at_reference_points
from detr_fabric.model.detr import DETR
from detr_fabric.model.parameters import freeze
from detr_fabric.model.position import LearnedPosition, SinePosition
from detr_fabric.model.pretrained import load_backbone_weights
from detr_fabric.model.transformer import Decoder, Encoder, Transformer


def build_model(
    model: ModelConfig, attn: AttnConfig, num_classes: int, pretrained: bool = True, focal: bool = False
) -> DETR:
    """The model of a resolved config; `pretrained` False skips the backbone's weights, because a checkpoint follows.

    focal: whether loss.kind is, which decides what the class head predicts.
    """
    backbone = Backbone(
        model.backbone, model.last_stage, model.dilation, model.norm == "frozen", model.gradient_checkpointing
    )
    if pretrained and model.backbone_weights != "none":
        assert model.backbone_weights is not None, "build_model takes a resolved config"
        load_backbone_weights(backbone.body, model.backbone, model.backbone_weights)
    position = (SinePosition if model.position == "sine" else LearnedPosition)(model.hidden_dim)
    original = model.cross_attention == "original"
    encoder = Encoder(model, attn)  # first: the order decides which initial weights a seed gives
    decoder = (Decoder if original else ConditionalDecoder)(model, attn)
    transformer = Transformer(encoder, decoder, model.gradient_checkpointing)
    detr = (DETR if original else ConditionalDETR)(
        backbone, position, transformer, model.hidden_dim, num_classes, model.num_queries, focal
    )
    if not original:
        start_at_reference_points(detr.bbox_embed)
    freeze(detr, model.freeze or ())
    return detr
