"""transformers' DETR with our weights: the peer that tests and benchmarks stand beside."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from detr_fabric.config import ModelConfig
from detr_fabric.model.detr import DETR

DEPTHS = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}

RENAMED = (
    (r"^backbone\.0\.body\.conv1", "model.backbone.model.embedder.embedder.convolution"),
    (r"^backbone\.0\.body\.bn1", "model.backbone.model.embedder.embedder.normalization"),
    (
        r"^backbone\.0\.body\.layer(\d)\.(\d+)",
        lambda m: f"model.backbone.model.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}",
    ),
    (r"\.conv(\d)\.weight$", lambda m: f".layer.{int(m[1]) - 1}.convolution.weight"),
    (r"\.bn(\d)\.(\w+)$", lambda m: f".layer.{int(m[1]) - 1}.normalization.{m[2]}"),
    (r"\.downsample\.0", ".shortcut.convolution"),
    (r"\.downsample\.1", ".shortcut.normalization"),
    (r"^class_embed", "class_labels_classifier"),
    (r"^bbox_embed", "bbox_predictor"),
    (r"^query_embed", "model.query_position_embeddings"),
    (r"^input_proj", "model.input_projection"),
    (r"^transformer", "model"),
    (r"multihead_attn", "encoder_attn"),
    (r"out_proj", "o_proj"),
    (r"\.linear(\d)", r".mlp.fc\1"),
    (r"(encoder\.layers\.\d+\.)norm1", r"\1self_attn_layer_norm"),
    (r"(encoder\.layers\.\d+\.)norm2", r"\1final_layer_norm"),
    (r"(decoder\.layers\.\d+\.)norm1", r"\1self_attn_layer_norm"),
    (r"(decoder\.layers\.\d+\.)norm2", r"\1encoder_attn_layer_norm"),
    (r"(decoder\.layers\.\d+\.)norm3", r"\1final_layer_norm"),
    (r"^model\.decoder\.norm\.", "model.decoder.layernorm."),
)


def transformers_detr(model: DETR, config: ModelConfig, num_classes: int) -> Any:
    """A DetrForObjectDetection of the same architecture (post-norm, sine positions, softmax) and the same weights."""
    import transformers

    # transformers builds its configs' signatures at run time, so their types are unknown here
    detr_config: Any = transformers.DetrConfig
    resnet_config: Any = transformers.ResNetConfig
    basic = config.backbone in ("resnet18", "resnet34")
    peer = transformers.DetrForObjectDetection(
        detr_config(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=resnet_config(
                depths=DEPTHS[config.backbone],
                layer_type="basic" if basic else "bottleneck",
                hidden_sizes=[64, 128, 256, 512] if basic else [256, 512, 1024, 2048],
                out_features=["stage4"],
            ),
            d_model=config.hidden_dim,
            encoder_layers=config.enc_layers,
            decoder_layers=config.dec_layers,
            encoder_attention_heads=config.heads,
            decoder_attention_heads=config.heads,
            encoder_ffn_dim=config.dim_feedforward,
            decoder_ffn_dim=config.dim_feedforward,
            num_queries=config.num_queries,
            num_labels=num_classes,
            auxiliary_loss=True,
            dropout=config.dropout,
            attention_dropout=config.dropout,
            activation_dropout=config.dropout,
        )
    )
    peer.load_state_dict(to_transformers(model.state_dict()))
    return peer


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under transformers' names, which keep the three input projections apart."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if "in_proj" in name:
            for part, chunk in zip(("q", "k", "v"), torch.chunk(value, 3), strict=True):
                renamed[name.replace("in_proj_", f"{part}_proj.")] = chunk
        else:
            renamed[name] = value
    return renamed
