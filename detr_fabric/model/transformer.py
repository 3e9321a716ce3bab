"""The transformer of DETR (Carion et al. 2020, figure 10): every attention adds positions to its queries and keys.

Shapes: B batch, S = h·w image tokens, Q queries, D width, L decoder layers. Batch first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr_fabric.model.attention import Attention

AttentionFactory = Callable[[], Attention]


class FeedForward(nn.Module):
    """What both kinds of layer share: the residual rule and the feed-forward block."""

    def __init__(self, dim: int, dim_feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def residual(self, x: Tensor, norm: nn.LayerNorm, block: Callable[[Tensor], Tensor]) -> Tensor:
        """Post-norm (the paper) normalises the sum; pre-norm normalises what the block reads."""
        if self.pre_norm:
            return x + self.dropout(block(norm(x)))
        return norm(x + self.dropout(block(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.linear1(x).relu()))


class EncoderLayer(FeedForward):
    def __init__(
        self, dim: int, dim_feedforward: int, dropout: float, pre_norm: bool, self_attn: AttentionFactory
    ) -> None:
        super().__init__(dim, dim_feedforward, dropout, pre_norm)
        self.self_attn = self_attn()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, src: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """src, pos (B, S, D), mask (B, S) True on padding → (B, S, D)."""

        def self_attention(x: Tensor) -> Tensor:
            query = x + pos
            return self.self_attn(query, query, x, mask)

        src = self.residual(src, self.norm1, self_attention)
        return self.residual(src, self.norm2, self.feed_forward)


class DecoderLayer(FeedForward):
    def __init__(
        self,
        dim: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
        self_attn: AttentionFactory,
        cross_attn: AttentionFactory,
    ) -> None:
        super().__init__(dim, dim_feedforward, dropout, pre_norm)
        self.self_attn = self_attn()
        self.multihead_attn = cross_attn()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, tgt: Tensor, memory: Tensor, memory_key: Tensor, mask: Tensor, query_pos: Tensor) -> Tensor:
        """tgt, query_pos (B, Q, D), memory (B, S, D), memory_key = memory + pos, mask (B, S) → (B, Q, D)."""

        def self_attention(x: Tensor) -> Tensor:
            query = x + query_pos
            return self.self_attn(query, query, x)

        def cross_attention(x: Tensor) -> Tensor:
            return self.multihead_attn(x + query_pos, memory_key, memory, mask)

        tgt = self.residual(tgt, self.norm1, self_attention)
        tgt = self.residual(tgt, self.norm2, cross_attention)
        return self.residual(tgt, self.norm3, self.feed_forward)


class Encoder(nn.Module):
    def __init__(self, layers: list[EncoderLayer], norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, src: Tensor, mask: Tensor, pos: Tensor, recompute: bool) -> Tensor:
        for layer in self.layers:
            src = checkpoint(layer, src, mask, pos, use_reentrant=False) if recompute else layer(src, mask, pos)
        return src if self.norm is None else self.norm(src)


class Decoder(nn.Module):
    def __init__(self, layers: list[DecoderLayer], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self, tgt: Tensor, memory: Tensor, mask: Tensor, pos: Tensor, query_pos: Tensor, recompute: bool
    ) -> Tensor:
        """Returns the normed output of every layer, (L, B, Q, D)."""
        memory_key = memory + pos
        hs = []
        for layer in self.layers:
            args = (tgt, memory, memory_key, mask, query_pos)
            tgt = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
            hs.append(tgt)
        return self.norm(torch.stack(hs))


class Transformer(nn.Module):
    """Image tokens and object queries → decoded queries of every layer. Each factory makes one attention block."""

    def __init__(
        self,
        encoder_self: AttentionFactory,
        decoder_self: AttentionFactory,
        decoder_cross: AttentionFactory,
        dim: int = 256,
        enc_layers: int = 6,
        dec_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        shared = (dim, dim_feedforward, dropout, pre_norm)
        self.encoder = Encoder(
            [EncoderLayer(*shared, encoder_self) for _ in range(enc_layers)], nn.LayerNorm(dim) if pre_norm else None
        )
        self.decoder = Decoder(
            [DecoderLayer(*shared, decoder_self, decoder_cross) for _ in range(dec_layers)], nn.LayerNorm(dim)
        )
        self.gradient_checkpointing = gradient_checkpointing
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """src, pos (B, S, D), mask (B, S) True on padding, query_embed (Q, D) → hs (L, B, Q, D), memory (B, S, D)."""
        recompute = self.gradient_checkpointing and self.training
        memory = self.encoder(src, mask, pos, recompute)
        query_pos = query_embed.expand(src.shape[0], -1, -1)
        tgt = torch.zeros_like(query_pos)
        return self.decoder(tgt, memory, mask, pos, query_pos, recompute), memory
