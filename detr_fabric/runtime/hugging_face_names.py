"""Hugging Face's names for a DETR: of its weights, as the published repositories have them, and of its settings.

transformers has three models of this architecture: "detr" (post-norm), "table-transformer" (pre-norm) and
"conditional_detr" (post-norm, --model.cross-attention conditional, --loss.kind focal).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from detr_fabric.config import ModelConfig
from detr_fabric.model.conditional import REFERENCE

DEPTHS = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}
BASIC = ("resnet18", "resnet34")
FAMILIES = {  # model_type: what the names of its classes begin with
    "detr": "Detr",
    "table-transformer": "TableTransformer",
    "conditional_detr": "ConditionalDetr",
    # our own, which only the code beside them can load: without it, softmax would take the place of their mappings
    "sparse-detr": "Detr",
    "sparse-conditional-detr": "ConditionalDetr",
}
LOSS = {  # their weights of matching and loss: ours
    "class_cost": "cost_class",
    "bbox_cost": "cost_bbox",
    "giou_cost": "cost_giou",
    "cls_loss_coefficient": "ce_coef",
    "bbox_loss_coefficient": "bbox_coef",
    "giou_loss_coefficient": "giou_coef",
    "eos_coefficient": "eos_coef",
}

BODY = "model.backbone.conv_encoder.model"
TIMM = ((r"^backbone\.0\.body", BODY),)  # timm's ResNet has torchvision's names
RESNET = (  # transformers' own ResNet
    (r"^backbone\.0\.body\.conv1", f"{BODY}.embedder.embedder.convolution"),
    (r"^backbone\.0\.body\.bn1", f"{BODY}.embedder.embedder.normalization"),
    (r"^backbone\.0\.body\.layer(\d)\.(\d+)", lambda m: f"{BODY}.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}"),
    (r"\.conv(\d)\.weight$", lambda m: f".layer.{int(m[1]) - 1}.convolution.weight"),
    (r"\.bn(\d)\.(\w+)$", lambda m: f".layer.{int(m[1]) - 1}.normalization.{m[2]}"),
    (r"\.downsample\.0", ".shortcut.convolution"),
    (r"\.downsample\.1", ".shortcut.normalization"),
)
OTHERS = (
    (r"^backbone\.1\.row_embed", "model.position_embedding.row_embeddings"),
    (r"^backbone\.1\.col_embed", "model.position_embedding.column_embeddings"),
    (r"^class_embed", "class_labels_classifier"),
    (r"^bbox_embed", "bbox_predictor"),
    (r"^query_embed", "model.query_position_embeddings"),
    (r"^input_proj", "model.input_projection"),
    (r"^transformer", "model"),
    (r"multihead_attn", "encoder_attn"),
    (r"\.linear(\d)", r".fc\1"),
    (r"(coder\.layers\.\d+\.)norm1", r"\1self_attn_layer_norm"),
    (r"(encoder\.layers\.\d+\.)norm2", r"\1final_layer_norm"),
    (r"(decoder\.layers\.\d+\.)norm2", r"\1encoder_attn_layer_norm"),
    (r"(decoder\.layers\.\d+\.)norm3", r"\1final_layer_norm"),
    (r"^model\.(en|de)coder\.norm\.", r"model.\1coder.layernorm."),
)
OLDER_AND_NEWER = (  # other spellings of the same names, of versions of transformers
    (r"^model\.backbone\.model\.", f"{BODY}."),
    (r"^model\.backbone\.position_embedding\.", "model.position_embedding."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.fc", ".fc"),
    (r"\.sa_([qkv])_?", r".self_attn.\1_"),  # of Conditional DETR, as the next
    (r"\.ca_([qkv])_?", r".encoder_attn.\1_"),
)


def their_names(name: str, timm: bool, conditional: bool = False) -> list[str]:
    """The names of the tensors that hold one of ours: three where we keep the projections of q, k and v in one."""
    for pattern, replacement in (*(TIMM if timm else RESNET), *OTHERS):
        name = re.sub(pattern, replacement, name)
    if "in_proj_" not in name:
        return [name]
    parts = ("q", "k", "v")
    if conditional and "decoder" in name:  # beside the attention block, not in it
        name = name.replace("self_attn.in_", "sa_in_").replace("encoder_attn.in_", "ca_in_")
        parts = ("qcontent", "kcontent", "v")
    return [name.replace("in_proj_", f"{part}_proj.") for part in parts]


def to_hugging_face(state: dict[str, Tensor], timm: bool = False) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names; timm: for timm's ResNet instead of transformers' own."""
    renamed: dict[str, Tensor] = {}
    conditional = REFERENCE in state
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):  # their norms are frozen
            names = their_names(name, timm, conditional)
            renamed |= zip(names, torch.chunk(value, len(names)) if len(names) > 1 else [value], strict=True)
    if "transformer.encoder.norm.weight" in state:  # the Table Transformer keeps learned positions elsewhere
        return {name.replace("model.position_", "model.backbone.position_"): value for name, value in renamed.items()}
    return renamed


def from_hugging_face(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The tensors called `own` out of Hugging Face's. Raises ValueError naming those that are missing or unknown."""
    theirs = {canonical(name): value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    timm = f"{BODY}.conv1.weight" in theirs
    ours = {
        name: [canonical(part) for part in their_names(name, timm, REFERENCE in own)]
        for name in own
        if not name.endswith("num_batches_tracked")
    }
    known = {name for names in ours.values() for name in names}
    missing, unknown = sorted(known - theirs.keys()), sorted(theirs.keys() - known)
    if missing or unknown:
        raise ValueError(
            f"{len(missing)} of its model's weights are missing and {len(unknown)} unknown, first: "
            f"{(missing + unknown)[0]:.100}"
        )
    return {name: torch.cat([theirs[part] for part in names]) for name, names in ours.items()}


def canonical(name: str) -> str:
    """A name of whatever version of transformers, in the one spelling in which names are compared."""
    for pattern, replacement in OLDER_AND_NEWER:
        name = re.sub(pattern, replacement, name)
    return name


def newest(name: str) -> str:
    """A published name as transformers 5 has it inside."""
    name = re.sub(r"(layers\.\d+)\.fc", r"\1.mlp.fc", canonical(name).replace("backbone.conv_encoder.", "backbone."))
    return name.replace(".out_proj.", ".o_proj.")


def model_type(model: ModelConfig, sparse: bool) -> str:
    """transformers' name for a model; sparse: whether it has another mapping than softmax."""
    if model.cross_attention == "conditional":
        return "sparse-conditional-detr" if sparse else "conditional_detr"
    return "sparse-detr" if sparse else "table-transformer" if model.pre_norm else "detr"


def architecture_fields(model: ModelConfig) -> dict[str, Any]:
    """A model's settings as config.json has them, without the classes. Raises KeyError for what it can't express."""
    stages = int(model.last_stage[-1])
    sizes = [64, 128, 256, 512] if model.backbone in BASIC else [256, 512, 1024, 2048]
    resnet = {
        "model_type": "resnet",
        "depths": DEPTHS[model.backbone][:stages],
        "hidden_sizes": sizes[:stages],
        "layer_type": "basic" if model.backbone in BASIC else "bottleneck",
        "out_features": [f"stage{stages}"],
    }
    return {
        # only timm's ResNet can be dilated
        "use_timm_backbone": model.dilation,
        "use_pretrained_backbone": False,
        "backbone": model.backbone if model.dilation else None,
        "backbone_config": None if model.dilation else resnet,
        "dilation": model.dilation,
        "d_model": model.hidden_dim,
        "encoder_layers": model.enc_layers,
        "decoder_layers": model.dec_layers,
        "encoder_attention_heads": model.heads,
        "decoder_attention_heads": model.heads,
        "encoder_ffn_dim": model.dim_feedforward,
        "decoder_ffn_dim": model.dim_feedforward,
        "num_queries": model.num_queries,
        "position_embedding_type": model.position,
        "activation_function": "relu",
        "dropout": model.dropout,
        "attention_dropout": model.dropout,
        "activation_dropout": model.dropout,
    }
