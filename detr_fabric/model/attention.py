"""Multi-head attention with a choice of the mapping from scores to weights; parameters as in nn.MultiheadAttention.

B batch, T queries, S keys, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fabric.config import Mapping
from detr_fabric.model import mappings


class Attention(nn.Module):
    """softmax(q k' / sqrt(D/H)) v in every head (Vaswani et al. 2017, section 3.2.2), or another mapping than softmax.

    Parameters have the names, shapes and initial values of nn.MultiheadAttention, whose state dict loads unchanged.
    "entmax-learned" has one more, alpha_logit (H,): see alpha.

    dim: D, a multiple of heads.
    alpha: exponent of "entmax", in [1, 2]; "entmax-learned" starts from it, inside (1, 2).
    topk: number of keys that "topk" keeps.
    dropout: probability that a weight is dropped in training.

    observer: while set, it is called with the weights (B, H, T, S) of each forward pass, before dropout.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mapping: Mapping = "softmax",
        alpha: float = 1.5,
        topk: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        assert dim % heads == 0, (dim, heads)
        self.heads = heads
        self.mapping = mapping
        self.topk = topk
        self.dropout = dropout
        self.observer: Callable[[Tensor], None] | None = None
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self.fixed_alpha = alpha
        if mapping == "entmax-learned":
            assert 1 < alpha < 2, alpha
            self.alpha_logit = nn.Parameter(torch.full((heads,), math.log((alpha - 1) / (2 - alpha))))

    @property
    def alpha(self) -> Tensor:
        """(H,) exponents 1 + sigmoid(alpha_logit) of "entmax-learned", which stay inside (1, 2)."""
        return 1 + self.alpha_logit.sigmoid()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """query (B, T, D), key and value (B, S, D), key_padding_mask (B, S) bool, True on padding → (B, T, D).

        An image whose keys are all padding gets weights and heads of 0, so that only the bias of out_proj is left.
        """
        inputs = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        projected = (F.linear(x, weight, bias) for x, weight, bias in inputs)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)  # (B, H, T or S, D/H)
        return self.out_proj(self.attend(q, k, v, key_padding_mask).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """The attention of projected heads: q (B, H, T, D/H), k and v (B, H, S, D/H) → (B, H, T, D/H)."""
        allowed = no_key = None
        if key_padding_mask is not None:
            # An image without keys attends to its padding until the end: no kernel has to survive a row without keys.
            no_key = key_padding_mask.all(-1)[:, None, None, None]
            allowed = ~key_padding_mask[:, None, None, :] | no_key  # (B, 1, 1, S)
        dropout = self.dropout if self.training else 0.0
        if self._fused(q, dropout):
            heads = F.scaled_dot_product_attention(q, k, v, allowed, dropout)
        else:
            weights = self._weights(q, k, allowed)
            if self.observer is not None:
                self.observer(weights if no_key is None else weights.masked_fill(no_key, 0.0))
            heads = F.dropout(weights.to(v.dtype), dropout) @ v
        return heads if no_key is None else heads.masked_fill(no_key, 0.0)

    def _fused(self, q: Tensor, dropout: float) -> bool:
        """Whether PyTorch's own kernel can be used and is fastest; on the CPU, at DETR's shapes, dropout slows it."""
        return self.mapping == "softmax" and self.observer is None and (q.device.type != "cpu" or dropout == 0)

    def _weights(self, q: Tensor, k: Tensor, allowed: Tensor | None) -> Tensor:
        """(B, H, T, S) weights. In float32 also under autocast: bfloat16 scores alone move them."""
        with torch.autocast(q.device.type, enabled=False):
            if q.dtype != torch.float64:
                q, k = q.float(), k.float()
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            if allowed is not None:
                scores += torch.zeros_like(allowed, dtype=scores.dtype).masked_fill_(~allowed, -math.inf)
            return self._map(scores)

    def _map(self, scores: Tensor) -> Tensor:
        match self.mapping:
            case "softmax":
                return scores.softmax(-1)
            case "sparsemax":
                return mappings.sparsemax(scores)
            case "entmax15":
                return mappings.entmax15(scores)
            case "entmax":
                return mappings.entmax(scores, self.fixed_alpha)
            case "entmax-learned":
                return mappings.entmax(scores, self.alpha[:, None, None])
            case "sigmoid":
                return mappings.sigmoid(scores)
            case "relu":
                return mappings.relu(scores)
            case "softmax1":
                return mappings.softmax1(scores)
            case "topk":
                return mappings.topk(scores, self.topk)
