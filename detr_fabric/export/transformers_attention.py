"""Our mappings as an attention function of transformers' DETR, registered by an exported folder's sparse_attention.py.

Shapes: B batch, H heads, T queries, S keys, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fabric.config import Config
from detr_fabric.model.mappings import MAPPINGS, Given
from detr_fabric.runtime.hugging_face import OURS
from detr_fabric.runtime.hugging_face_names import FAMILIES, model_type

NAME = "detr_fabric"  # as attn_implementation
FILE = "sparse_attention.py"
SOURCE = '''"""DETR whose attention maps scores to weights with {mappings}, for transformers.

Load the model with trust_remote_code=True, or import this file before. It needs the package detr_fabric.
"""

from transformers import AutoConfig, AutoModelForObjectDetection, {family}Config
from transformers import {family}ForObjectDetection as Softmax

from detr_fabric.export.transformers_attention import NAME, register


class SparseDetrConfig({family}Config):
    model_type = "{model_type}"


class {family}ForObjectDetection(Softmax):  # a name that pipelines know
    config_class = SparseDetrConfig

    def __init__(self, config):
        config._attn_implementation = NAME
        super().__init__(config)


register()
AutoConfig.register("{model_type}", SparseDetrConfig, exist_ok=True)
AutoModelForObjectDetection.register(SparseDetrConfig, {family}ForObjectDetection, exist_ok=True)
'''


def source(config: Config) -> str:
    """What an exported folder's sparse_attention.py holds."""
    kind = model_type(config.model, sparse=True)
    mappings = " and ".join(dict.fromkeys(config.attn.mappings))
    return SOURCE.format(mappings=mappings, model_type=kind, family=FAMILIES[kind])


def register() -> None:
    """Makes attn_implementation=NAME known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size: int, kv_length: int, attention_mask: Tensor | None = None, **others: object
) -> Tensor:  # transformers also says what it does for causal masks
    """attention_mask (B, S) bool, False on padding → (B, 1, 1, S), also where nothing is padding: `attention` tells the
    encoder's blocks from the decoder's by it."""
    if attention_mask is None:
        return torch.ones(batch_size, 1, 1, kv_length, dtype=torch.bool)
    return attention_mask[:, None, None, :]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **others: object,  # options of other attention functions
) -> tuple[Tensor, Tensor]:
    """query (B, H, T, D/H), key and value (B, H, S, D/H), attention_mask as `mask` makes it → output (B, T, H, D/H) and
    weights (B, H, T, S)."""
    config: Any = module.config
    attn = Config.from_dict({"attn": getattr(config, OURS)["attn"]}).attn
    encoder, decoder, cross = attn.mappings
    own = cross if type(module).__name__.endswith("CrossAttention") else decoder if attention_mask is None else encoder
    scores = (query.float() * scaling) @ key.float().transpose(-1, -2)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    weights = MAPPINGS[own].weights(scores, Given(attn, {})).to(value.dtype)
    output = F.dropout(weights, dropout, module.training) @ value
    return output.transpose(1, 2).contiguous(), weights
