"""What a DETR's attention blocks compute, seen by observers that stay for the length of a `with` block.

Shapes: B batch, h×w features, H heads, T queries and S keys of one attention block (image tokens: h·w).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from detr_fabric.model.attention import Attention
from detr_fabric.model.detr import DETR
from detr_fabric.model.transformer import DecoderLayer, EncoderLayer

Site = Literal["encoder_self", "decoder_self", "decoder_cross"]
SITES: tuple[Site, ...] = ("encoder_self", "decoder_self", "decoder_cross")

Observer = Callable[[Site, int, Tensor, Tensor], None]
"""Gets site, layer (from 0), weights (B, H, T, S) and the feature mask (B, h, w), True on padding."""


def unwrap(model: nn.Module) -> DETR:
    """The DETR inside the wrappers of Fabric, DDP and torch.compile."""
    while not isinstance(model, DETR):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        assert isinstance(inner, nn.Module), f"{type(model).__name__} holds no DETR"
        model = inner
    return model


def attention_blocks(model: DETR) -> dict[Site, list[Attention]]:
    """All attention blocks by site, in the order of the layers."""
    encoder = cast(list[EncoderLayer], model.transformer.encoder.layers)
    decoder = cast(list[DecoderLayer], model.transformer.decoder.layers)
    return {
        "encoder_self": [layer.self_attn for layer in encoder],
        "decoder_self": [layer.self_attn for layer in decoder],
        "decoder_cross": [layer.multihead_attn for layer in decoder],
    }


def mappings(model: DETR) -> dict[Site, str]:
    """The mapping of each site that has a layer."""
    return {site: blocks[0].mapping for site, blocks in attention_blocks(model).items() if blocks}


def mapping_names(model: DETR) -> str:
    """The mappings in short, as figures show them."""
    return " / ".join(dict.fromkeys(mappings(model).values()))


@contextmanager
def observe(model: nn.Module, see: Observer) -> Iterator[DETR]:
    """Calls `see` for every attention block of every forward pass; yields the unwrapped DETR, which must be the one
    that is run: a compiled model would be compiled anew, and DDP's forward would wait for other ranks.

    On leaving, also by an error, every block has the observer it had before.
    """
    detr = unwrap(model)
    masks: list[Tensor] = []

    def keep_mask(module: nn.Module, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        masks[:] = [outputs[1]]

    def observer(site: Site, layer: int, weights: Tensor) -> None:
        see(site, layer, weights.detach(), masks[0])

    with ExitStack() as undo:
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.callback(detr.backbone[0].register_forward_hook(keep_mask).remove)
        for site, blocks in attention_blocks(detr).items():
            for layer, block in enumerate(blocks):
                undo.callback(setattr, block, "observer", block.observer)
                block.observer = partial(observer, site, layer)
        yield detr


@dataclass
class Captured:
    """The attention of the latest forward pass; empty before the first."""

    weights: dict[Site, dict[int, Tensor]] = field(default_factory=lambda: {site: {} for site in SITES})
    """By site and layer (from 0), each (B, H, T, S)."""
    mask: Tensor | None = None
    """(B, h, w), True on padding."""


@contextmanager
def capture(model: nn.Module) -> Iterator[Captured]:
    """Keeps the weights of all attention blocks:

    with capture(model) as seen:
        unwrap(model)(images, mask)
    seen.weights["decoder_cross"][5]

    Many or large images fill the memory; `observe` looks at one block at a time.
    """
    captured = Captured()

    def keep(site: Site, layer: int, weights: Tensor, mask: Tensor) -> None:
        captured.weights[site][layer] = weights
        captured.mask = mask

    with observe(model, keep):
        yield captured
