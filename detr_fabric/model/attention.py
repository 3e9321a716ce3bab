"""Multi-head attention with a choice of the mapping from scores to weights; parameters as in nn.MultiheadAttention.

Shapes: B batch, T queries, S keys, D width, H heads; W width of a head's queries and keys, here D/H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr_fabric.config import AttnConfig, CrossMapping
from detr_fabric.model.kernels import agreed, entmax_attention, fused_alpha
from detr_fabric.model.mappings import MAPPINGS, Given
from detr_fabric.model.padding import Padding


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(D/H)) v in every head (Vaswani et al. 2017, section 3.2.2), or another mapping than softmax.

    Parameters have the names, shapes and initial values of nn.MultiheadAttention, whose state dict loads unchanged;
    a learned mapping adds its own.

    dim: D, a multiple of heads.
    mapping: None means attn.kind. attn also holds the settings of the mappings.
    dropout: probability that a weight is dropped in training.

    softmax_first: while True, training uses softmax and evaluation the mapping (set by attend_with_softmax).
    observer: while set, it is called with the weights (B, H, T, S) of each forward pass, before dropout.
    """

    def __init__(
        self, dim: int, heads: int, attn: AttnConfig, mapping: CrossMapping | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        assert dim % heads == 0, (dim, heads)
        self.heads = heads
        self.attn = attn
        self.mapping = mapping or attn.kind
        self.dropout = dropout
        self.softmax_first = False
        self.observer: Callable[[Tensor], None] | None = None
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        for learned in MAPPINGS[self.mapping].learned:
            self.register_parameter(learned.parameter, nn.Parameter(torch.full((heads,), learned.start(attn))))

    def current(self) -> CrossMapping:
        """The mapping of a forward pass now."""
        return "softmax" if self.softmax_first and self.training else self.mapping

    def learned(self) -> dict[str, Tensor]:
        """What the mapping learns, by name: numbers (H,), one for each head."""
        numbers = MAPPINGS[self.mapping].learned
        return {learned.name: learned.number(self.get_parameter(learned.parameter), self.attn) for learned in numbers}

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Padding | Tensor | None = None
    ) -> Tensor:
        """query (B, T, D), key and value (B, S, D), key_padding_mask (B, S) bool, True on padding → (B, T, D).

        Where the keys are a grid of image tokens, the mask is (B, h, w) instead, S = h·w. Blocks that share a mask are
        given the `Padding` of it. An image whose keys are all padding gets weights and heads of 0, so that only the
        bias of out_proj is left.
        """
        q, k, v = self.project(query, key, value)
        return self.merge(self.attend(q, k, v, key_padding_mask))

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """query (B, T, D), key and value (B, S, D) → the projected heads of each, (B, H, T or S, D/H)."""
        dim = query.shape[-1]
        weights, biases = self.in_proj_weight.view(3, dim, dim), self.in_proj_bias.view(3, 1, dim)
        if query.shape == key.shape:
            return self._project([query, key, value], weights, biases)
        (of_query, of_keys), (bias, key_biases) = weights.split([1, 2]), biases.split([1, 2])
        return *self._project([query], of_query, bias), *self._project([key, value], of_keys, key_biases)

    def _project(self, inputs: list[Tensor], weights: Tensor, biases: Tensor) -> tuple[Tensor, ...]:
        """The heads of N inputs of one shape (B, T, D) in one product; weights (N, D, D), biases (N, 1, D)."""
        stacked = torch.stack(inputs)  # (N, B, T, D)
        projected = torch.baddbmm(biases, stacked.flatten(1, 2), weights.transpose(1, 2))
        return tuple(self.split(x) for x in projected.view_as(stacked).unbind())

    def split(self, x: Tensor) -> Tensor:
        """(B, T, D) → heads (B, H, T, D/H)."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def merge(self, heads: Tensor) -> Tensor:
        """Heads (B, H, T, D/H) → the output (B, T, D)."""
        out: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Padding | Tensor | None = None) -> Tensor:
        """The attention of projected heads: q (B, H, T, W), k (B, H, S, W), v (B, H, S, D/H) → (B, H, T, D/H)."""
        mask = key_padding_mask
        padding = Padding.of(mask, q.dtype) if isinstance(mask, Tensor) else mask
        dropout = self.dropout if self.training else 0.0
        kernels = self.attn.fused and self.observer is None and agreed(q)
        alpha = fused_alpha(self.current(), self.attn, self.learned()) if kernels else None
        if self._uses_sdpa(q, dropout):
            heads = F.scaled_dot_product_attention(q, k, v, None if padding is None else padding.bias, dropout)
        elif alpha is not None:
            heads = entmax_attention(q, k, v, None if padding is None else padding.allowed, alpha, dropout)
        elif self._recomputes(q):
            heads = checkpoint(self._explicit, q, k, v, padding, dropout, use_reentrant=False)
        else:
            heads = self._explicit(q, k, v, padding, dropout)
        if self.current() != self.mapping:
            for number in self.learned().values():  # DDP waits for a gradient of every parameter, here of 0
                heads = heads + 0 * number.sum()
        if padding is None:
            return heads
        # masked_fill gives (B, T, H, D/H) as it lies in memory, so that `merge` copies nothing
        return heads.transpose(1, 2).masked_fill(padding.no_key, 0.0).transpose(1, 2)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, padding: Padding | None, dropout: float) -> Tensor:
        """The heads by way of all weights (B, H, T, S)."""
        weights = self._weights(q, k, padding)
        if self.observer is not None:
            self.observer(weights if padding is None else weights.masked_fill(padding.no_key, 0.0))
        return F.dropout(weights.to(v.dtype), dropout) @ v

    def _recomputes(self, q: Tensor) -> bool:
        """Whether the backward pass computes the weights again (with the same dropout), so that none are kept."""
        wanted = q.device.type == "cuda" if self.attn.recompute is None else self.attn.recompute
        return wanted and torch.is_grad_enabled() and self.observer is None

    def _uses_sdpa(self, q: Tensor, dropout: float) -> bool:
        """Whether PyTorch's own kernel can be used and is fastest; the CPU's is slow with dropout at DETR's shapes."""
        return self.current() == "softmax" and self.observer is None and (q.device.type != "cpu" or dropout == 0)

    def _weights(self, q: Tensor, k: Tensor, padding: Padding | None) -> Tensor:
        """(B, H, T, S) weights, in float32 also under autocast, because bfloat16 scores would change them."""
        with torch.autocast(q.device.type, enabled=False):
            if q.dtype != torch.float64:
                q, k = q.float(), k.float()
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            if padding is not None:
                scores += padding.bias
            learned = {name: number[:, None, None] for name, number in self.learned().items()}
            return MAPPINGS[self.current()].weights(scores, Given(self.attn, learned, padding and padding.grid))


def attend_with_softmax(model: nn.Module, softmax: bool) -> None:
    """Whether the blocks of a model use softmax in training instead of their own mapping."""
    for block in model.modules():
        if isinstance(block, Attention):
            block.softmax_first = softmax
