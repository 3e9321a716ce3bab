"""The transformer of DETR (Carion et al. 2020, figure 10): every attention adds positions to its queries and keys.

Shapes: B batch, S = h·w image tokens, Q queries, D width, L decoder layers. Batch first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr_fabric.config import AttnConfig, CrossMapping, ModelConfig
from detr_fabric.model.attention import Attention
from detr_fabric.model.padding import Padding


class Layer(nn.Module):
    """What encoder and decoder layers share: how residual blocks are normalised, and the feed-forward block."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(model.hidden_dim, model.dim_feedforward)
        self.linear2 = nn.Linear(model.dim_feedforward, model.hidden_dim)
        self.dropout = nn.Dropout(model.dropout)
        self.pre_norm = model.pre_norm

    def residual(self, x: Tensor, norm: nn.LayerNorm, block: Callable[[Tensor], Tensor]) -> Tensor:
        """x plus the block's output. Post-norm (the paper) normalises the sum, pre-norm the block's input."""
        out: Tensor = x + self.dropout(block(norm(x))) if self.pre_norm else norm(x + self.dropout(block(x)))
        return out

    def feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear2(self.dropout(self.linear1(x).relu()))
        return out


class EncoderLayer(Layer):
    """Self-attention of the image tokens, then the feed-forward block."""

    def __init__(self, model: ModelConfig, attn: AttnConfig) -> None:
        super().__init__(model)
        self.self_attn = attention(model, attn, attn.encoder_self)
        self.norm1 = nn.LayerNorm(model.hidden_dim)
        self.norm2 = nn.LayerNorm(model.hidden_dim)

    def forward(self, src: Tensor, padding: Padding, pos: Tensor) -> Tensor:
        """src, pos (B, S, D), padding of the S tokens → (B, S, D)."""

        def self_attention(x: Tensor) -> Tensor:
            query = x + pos
            out: Tensor = self.self_attn(query, query, x, padding)
            return out

        src = self.residual(src, self.norm1, self_attention)
        return self.residual(src, self.norm2, self.feed_forward)


class DecoderLayer(Layer):
    """Self-attention of the object queries, cross-attention to the image tokens, then the feed-forward block."""

    def __init__(self, model: ModelConfig, attn: AttnConfig) -> None:
        super().__init__(model)
        self.self_attn = attention(model, attn, attn.decoder_self)
        self.multihead_attn = attention(model, attn, attn.decoder_cross)
        self.norm1 = nn.LayerNorm(model.hidden_dim)
        self.norm2 = nn.LayerNorm(model.hidden_dim)
        self.norm3 = nn.LayerNorm(model.hidden_dim)

    def forward(self, tgt: Tensor, memory: Tensor, memory_key: Tensor, padding: Padding, query_pos: Tensor) -> Tensor:
        """tgt, query_pos (B, Q, D), memory (B, S, D), memory_key = memory + pos, padding of S → (B, Q, D)."""

        def self_attention(x: Tensor) -> Tensor:
            query = x + query_pos
            out: Tensor = self.self_attn(query, query, x)
            return out

        def cross_attention(x: Tensor) -> Tensor:
            out: Tensor = self.multihead_attn(x + query_pos, memory_key, memory, padding)
            return out

        tgt = self.residual(tgt, self.norm1, self_attention)
        tgt = self.residual(tgt, self.norm2, cross_attention)
        return self.residual(tgt, self.norm3, self.feed_forward)


class Encoder(nn.Module):
    """Encoder layers; pre-norm needs one more norm at the end."""

    def __init__(self, model: ModelConfig, attn: AttnConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(model, attn) for _ in range(model.enc_layers))
        self.norm = nn.LayerNorm(model.hidden_dim) if model.pre_norm else None

    def forward(self, src: Tensor, padding: Padding, pos: Tensor, recompute: bool) -> Tensor:
        for layer in self.layers:
            src = checkpoint(layer, src, padding, pos, use_reentrant=False) if recompute else layer(src, padding, pos)
        return src if self.norm is None else self.norm(src)


class Decoder(nn.Module):
    """Decoder layers and the norm that all of their outputs pass."""

    def __init__(self, model: ModelConfig, attn: AttnConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(model, attn) for _ in range(model.dec_layers))
        self.norm = nn.LayerNorm(model.hidden_dim)

    def forward(
        self, tgt: Tensor, memory: Tensor, padding: Padding, pos: Tensor, query_pos: Tensor, recompute: bool
    ) -> Tensor:
        """Returns the normed output of every layer, (L, B, Q, D)."""
        memory_key = memory + pos
        hs = []
        for layer in self.layers:
            args = (tgt, memory, memory_key, padding, query_pos)
            tgt = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
            hs.append(tgt)
        normed: Tensor = self.norm(torch.stack(hs))
        return normed


class Transformer(nn.Module):
    """Image tokens and object queries → decoded queries of every layer."""

    def __init__(self, encoder: Encoder, decoder: nn.Module, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.gradient_checkpointing = gradient_checkpointing
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos: Tensor) -> Tensor:
        """src, pos (B, S, D), mask (B, h, w) True on padding, query_embed (Q, D) → hs (L, B, Q, D)."""
        recompute = self.gradient_checkpointing and self.training
        padding = Padding.of(mask, src.dtype)
        memory = self.encoder(src, padding, pos, recompute)
        query_pos = query_embed.expand(src.shape[0], -1, -1)
        tgt = torch.zeros_like(query_pos)
        hs: Tensor = self.decoder(tgt, memory, padding, pos, query_pos, recompute)
        return hs


def attention(model: ModelConfig, attn: AttnConfig, mapping: CrossMapping | None) -> Attention:
    """An attention block; its mapping is attn.kind where it does not have its own."""
    return Attention(model.hidden_dim, model.heads, attn, mapping, model.dropout)
