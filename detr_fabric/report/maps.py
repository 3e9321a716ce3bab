"""What one model did with one image, as the attention explorer reads it: small, and exact in what is 0.

A block is one map of attention, of a site, a layer and a head or the mean over heads: a row for each query that is kept
(cross-attention) or each place of the image (the encoder's), a column for each image token. It is sent as zlib's
compression of

    codes   (rows, S) uint8: 0 where a weight is exactly 0, else 255 √(weight / largest of its row), at least 1
    numbers (rows, 5) float32, little-endian, computed from the weights themselves: the largest weight, keys with a
            weight other than 0, keys with one of at most 1e-6, the entropy, and the share inside the query's box

in base64. Shapes: H heads, Q queries, S tokens of the image's h×w grid, R rows.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fabric.analysis import measures
from detr_fabric.analysis.maps import Attention
from detr_fabric.boxes import xyxy_to_cxcywh

PLACES = 144  # most places of an image whose reading is kept


@dataclass(frozen=True)
class ImageAttention:
    """The attention of one image without its padding, on the CPU."""

    cross: list[Tensor]  # by layer, (H, Q, S)
    encoder: list[Tensor]  # by layer, (H, S, S)
    grid: tuple[int, int]  # h, w


def image_attention(seen: Attention) -> ImageAttention:
    """The same with the cells of an image in one row, as the page counts them."""
    cross, encoder = seen.decoder_cross, seen.encoder_self
    h, w = cross.shape[-2:]
    return ImageAttention([*cross.flatten(-2)], [layer.reshape(-1, h * w, h * w) for layer in encoder], (h, w))


def places(grid: tuple[int, int]) -> list[int]:
    """The tokens whose reading is kept: all, or one of each square of s×s."""
    h, w = grid
    step = next(s for s in range(1, max(grid) + 1) if -(-h // s) * -(-w // s) <= PLACES)
    rows, columns = (range(min((step - 1) // 2, side - 1), side, step) for side in grid)
    return [row * w + column for row in rows for column in columns]


def blocks(attention: ImageAttention, queries: Sequence[int], boxes: Tensor, budget: float) -> dict[str, str]:
    """Blocks by name, cross/<layer>/<head> and encoder/<layer>/<head>, head: a number or "mean"; what matters most
    first, until `budget` characters are full. boxes: (Q, 4) xyxy in [0, 1], predicted."""
    h, w = attention.grid
    covered = measures.cover(xyxy_to_cxcywh(boxes[list(queries)]), h, w)  # (R, S)
    rows = {"cross": list(queries), "encoder": places(attention.grid)}
    kept: dict[str, str] = {}
    for site, layer, head in order(attention):
        heads = getattr(attention, site)[layer][:, rows[site]]  # (H, R, S)
        weights = heads.mean(0) if head is None else heads[head]
        block = encoded(weights, covered if site == "cross" else None)
        if kept and len(block) > budget:
            break
        budget -= len(block)
        kept[f"{site}/{layer}/{'mean' if head is None else head}"] = block
    return kept


def order(attention: ImageAttention) -> Iterator[tuple[str, int, int | None]]:
    """Site, layer and head (None: the mean) of all blocks: means before heads, last layers before earlier ones."""
    cross, encoder = (list(reversed(range(len(each)))) for each in (attention.cross, attention.encoder))
    heads = range(attention.cross[0].shape[0])
    yield from (("cross", layer, None) for layer in cross[:1])
    yield from (("encoder", layer, None) for layer in encoder[:1])
    yield from (("cross", layer, None) for layer in cross[1:])
    yield from (("cross", layer, head) for layer in cross[:1] for head in heads)
    yield from (("encoder", layer, None) for layer in encoder[1:])
    yield from (("cross", layer, head) for layer in cross[1:] for head in heads)
    yield from (("encoder", layer, head) for layer in encoder for head in heads)


def encoded(weights: Tensor, covered: Tensor | None) -> str:
    """One block, see above. weights (R, S); covered (R, S): the part of each cell that the row's box covers."""
    largest = weights.amax(-1, keepdim=True)
    codes = (255 * (weights / largest.clamp_min(torch.finfo(weights.dtype).tiny)).sqrt()).round().clamp(1, 255)
    codes = torch.where(weights > 0, codes, 0).to(torch.uint8)
    raw = codes.numpy().tobytes() + numbers(weights, covered).numpy().astype("<f4").tobytes()
    return base64.b64encode(zlib.compress(raw)).decode()


def numbers(weights: Tensor, covered: Tensor | None) -> Tensor:
    """weights (R, S) → (R, 5): largest, keys, keys of at most 1e-6, entropy, share inside the box (0 without boxes)."""
    alone = weights[:, None]  # a map of its own for each row, because measures are means over rows
    inside = torch.zeros(len(weights)) if covered is None else measures.share_inside(weights[None], covered)[0]
    near = (weights <= measures.NEAR_ZERO).sum(-1)
    return torch.stack([weights.amax(-1), measures.support(alone), near, measures.entropy(alone), inside], -1).float()


def image_of_run(
    attention: ImageAttention,
    scores: Tensor,
    boxes: Tensor,
    names: Sequence[str],
    count: int,
    budget: float,
) -> dict[str, Any]:
    """All that the explorer knows of one image in one run: the `count` queries with the highest scores, and blocks.

    scores (Q,), boxes (Q, 4) xyxy in [0, 1], names: the class of each query.
    """
    queries = scores.argsort(descending=True, stable=True)[:count].tolist()
    return {
        "grid": list(attention.grid),
        "queries": queries,
        "scores": [round(float(scores[query]), 4) for query in queries],
        "names": [names[query] for query in queries],
        "boxes": [[round(side, 5) for side in boxes[query].tolist()] for query in queries],
        "places": places(attention.grid),
        "blocks": blocks(attention, queries, boxes, budget),
    }
