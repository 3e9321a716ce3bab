"""Conditional DETR (Meng et al. 2021, arXiv 2108.06152): a decoder beside the original's, `--model.cross-attention`.

In the original's cross-attention a query and a key are each content plus position, so that scores mix all four. Here
they are the two side by side, [content, position], and a score is the sum of content · content and position · position.
Each object query has a reference point s in the image; its position is T(f) ⊙ PE(s) (equation 5), where T is a function
of the decoder's state f and PE the sine encoding that the keys have. So a head can look at a place near the
reference point, say at one side of the object, without finding it by its content. Boxes are offsets from s.

Names of parameters are those of the authors' code, as far as it has them. Its `sa_qcontent_proj`, `sa_kcontent_proj`
and `sa_v_proj` are the three parts of self_attn.in_proj here, those of cross-attention of multihead_attn.in_proj.

Shapes: B batch, S = h·w image tokens, Q queries, D width, H heads, L decoder layers. Batch first.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr_fabric.config import AttnConfig, ModelConfig
from detr_fabric.model.detr import DETR, MLP
from detr_fabric.model.padding import Padding
from detr_fabric.model.position import sines
from detr_fabric.model.transformer import Layer, attention

REFERENCE = "transformer.decoder.ref_point_head.layers.0.weight"  # in the state dict: the decoder is conditional


class ConditionalDecoderLayer(Layer):
    """Self-attention of the object queries, conditional cross-attention to the image tokens, and the feed-forward
    block. Both attentions project content by their own `in_proj` and positions by layers of their own."""

    def __init__(self, model: ModelConfig, attn: AttnConfig, first: bool) -> None:
        super().__init__(model)
        dim = model.hidden_dim
        self.self_attn = attention(model, attn, attn.decoder_self)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.multihead_attn = attention(model, attn, attn.decoder_cross)
        self.ca_qpos_proj = nn.Linear(dim, dim) if first else None
        self.ca_kpos_proj = nn.Linear(dim, dim)
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, tgt: Tensor, memory: Tensor, pos: Tensor, padding: Padding, query_pos: Tensor, spatial: Tensor
    ) -> Tensor:
        """tgt, query_pos, spatial (B, Q, D), memory, pos (B, S, D), padding of the S tokens → (B, Q, D).

        spatial: T(f) ⊙ PE(s), the positions of the queries as cross-attention compares them.
        """

        def self_attention(x: Tensor) -> Tensor:
            block = self.self_attn
            q, k, v = block.project(x, x, x)
            q = q + block.split(self.sa_qpos_proj(query_pos))
            k = k + block.split(self.sa_kpos_proj(query_pos))
            return block.merge(block.attend(q, k, v))

        def cross_attention(x: Tensor) -> Tensor:
            block = self.multihead_attn
            q, k, v = block.project(x, memory, memory)  # each (B, H, Q or S, D/H)
            q_pos, k_pos = block.split(self.ca_qpos_sine_proj(spatial)), block.split(self.ca_kpos_proj(pos))
            if self.ca_qpos_proj is not None:  # tgt is still empty: content is compared with the query embedding
                q, k = q + block.split(self.ca_qpos_proj(query_pos)), k + k_pos
            q, k = torch.cat([q, q_pos], -1), torch.cat([k, k_pos], -1)  # (B, H, Q or S, 2D/H)
            return block.merge(block.attend(q, k, v, padding))

        tgt = self.residual(tgt, self.norm1, self_attention)
        tgt = self.residual(tgt, self.norm2, cross_attention)
        return self.residual(tgt, self.norm3, self.feed_forward)


class ConditionalDecoder(nn.Module):
    """Decoder layers, the norm that all of their outputs pass, and the reference points."""

    def __init__(self, model: ModelConfig, attn: AttnConfig) -> None:
        super().__init__()
        dim, layers = model.hidden_dim, model.dec_layers
        self.layers = nn.ModuleList(ConditionalDecoderLayer(model, attn, first=n == 0) for n in range(layers))
        self.norm = nn.LayerNorm(dim)
        # T, the identity in the first layer; a parameter without a gradient would stop DDP.
        self.query_scale = MLP(dim, dim, dim, 2) if layers > 1 else None
        self.ref_point_head = MLP(dim, dim, 2, 2)

    def reference(self, query_pos: Tensor) -> Tensor:
        """The logits of the reference points: query_pos (..., D) → (..., 2), x and y. In float32 whatever autocast
        says, because boxes and the highest frequencies depend on every digit."""
        with torch.autocast(query_pos.device.type, enabled=False):
            logits: Tensor = self.ref_point_head(query_pos)
            return logits

    def forward(
        self, tgt: Tensor, memory: Tensor, padding: Padding, pos: Tensor, query_pos: Tensor, recompute: bool
    ) -> Tensor:
        """As Decoder.forward. Returns the normed output of every layer, (L, B, Q, D)."""
        encoded = sines(self.reference(query_pos).sigmoid().flip(-1), query_pos.shape[-1])  # PE(s), (B, Q, D)
        hs: list[Tensor] = []
        for layer in self.layers:
            spatial = encoded if not hs or self.query_scale is None else self.query_scale(tgt) * encoded
            args = (tgt, memory, pos, padding, query_pos, spatial)
            tgt = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
            hs.append(tgt)
        normed: Tensor = self.norm(torch.stack(hs))
        return normed


class ConditionalDETR(DETR):
    """A DETR with a ConditionalDecoder, whose boxes are offsets from the reference points of the queries."""

    def boxes(self, hs: Tensor) -> Tensor:
        """As DETR.boxes."""
        center, size = self.bbox_embed(hs).split(2, -1)
        reference = cast(ConditionalDecoder, self.transformer.decoder).reference(self.query_embed.weight)
        return torch.cat([center + reference, size], -1).sigmoid()


def start_at_reference_points(box_head: MLP) -> None:
    """Sets the last layer of a fresh box head to 0, so that the first boxes lie around the reference points."""
    last = cast(nn.Linear, box_head.layers[-1])
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
