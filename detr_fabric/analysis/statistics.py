"""The measures of every attention head over a set of images: as curves, as a table, and for the report.

Shapes: B batch, H heads, Q queries, P matched pairs of an image. Layers and heads count from 0, as in the state dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn

from detr_fabric.analysis import measures
from detr_fabric.analysis.capture import SITES, Site, attention_blocks, observe, plain
from detr_fabric.batch import ImageBatch, Target, normalize, pad_images
from detr_fabric.config import Mapping
from detr_fabric.data.coco import CocoDetection
from detr_fabric.loss.matcher import match, pad_targets
from detr_fabric.model.detr import DETROutput

MAP_MEASURES = (measures.zeros, measures.near_zeros, measures.support, measures.entropy, measures.gini)


class HeadStatistics(NamedTuple):
    """One attention head. Measures of a map are means over images, each without its padding (see measures.py)."""

    site: Site
    layer: int
    head: int
    mapping: Mapping
    zeros: float  # part of the weights that are exactly 0
    near_zeros: float  # part of the weights below 1e-6, exact zeros included
    support: float  # keys with a weight other than 0, of a query
    entropy: float  # nats, of a query
    gini: float  # of the whole map
    paibb: float | None  # cross-attention: mass inside the true box, mean over matched pairs; None without pairs
    alpha: float | None  # entmax-learned: the learned exponent


class AttentionStatistics(NamedTuple):
    """All heads of a model over some images."""

    heads: list[HeadStatistics]
    images: int
    pairs: int  # of a query of the last layer and the object it is matched to
    box_area: float | None  # mean part of the image that their boxes cover: the PAIBB of even attention

    def curves(self) -> dict[str, float]:
        """attention/<site>/layer<l>/<measure>, means over heads; attention/box_area; alpha/<site>/layer<l>/head<h>."""
        curves: dict[str, float] = {}
        if self.box_area is not None:
            curves["attention/box_area"] = self.box_area
        for site, layer in dict.fromkeys((head.site, head.layer) for head in self.heads):
            heads = [head for head in self.heads if (head.site, head.layer) == (site, layer)]
            for measure in ("zeros", "near_zeros", "support", "entropy", "gini", "paibb"):
                values = [getattr(head, measure) for head in heads]
                if None not in values:
                    curves[f"attention/{site}/layer{layer}/{measure}"] = sum(values) / len(values)
        alphas = [head for head in self.heads if head.alpha is not None]
        return curves | {f"alpha/{h.site}/layer{h.layer}/head{h.head}": h.alpha for h in alphas if h.alpha is not None}

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows, one row a head."""
        return list(HeadStatistics._fields), [list(head) for head in self.heads]


def mean_alphas(model: nn.Module) -> dict[str, float]:
    """alpha/<site>/layer<l>: learned exponents, means over heads; nothing where none is learned."""
    return {
        f"alpha/{site}/layer{layer}": block.alpha.mean().item()
        for site, blocks in attention_blocks(plain(model)).items()
        for layer, block in enumerate(blocks)
        if block.mapping == "entmax-learned"
    }


def sample(dataset: CocoDetection, count: int) -> Iterator[tuple[ImageBatch, list[Target]]]:
    """Up to `count` images spread evenly over a data set, one at a time: the same ones at every call."""
    count = min(count, len(dataset))
    for number in range(count):
        image, target = dataset[(0, number * len(dataset) // count)]
        yield pad_images([image]), [target]


@torch.no_grad()
def attention_statistics(
    model: nn.Module, batches: Iterable[tuple[ImageBatch, list[Target]]], costs: tuple[float, float, float]
) -> AttentionStatistics:
    """The statistics of a model's attention over batches as the loaders give them (at least one image).

    model: as it is or wrapped by Fabric; computed in float32 on its device, in this process alone, without collectives.
    It is left in evaluation mode. costs: of matching class, box and overlap. PAIBB is of the pairs that the last
    layer's predictions are matched in, in every layer: does what becomes this object's query look at the object?
    """
    detr = plain(model).eval()
    device = detr.query_embed.weight.device
    blocks = attention_blocks(detr)
    sums = {(site, layer): torch.zeros((), device=device) for site in SITES for layer in range(len(blocks[site]))}
    inside = [torch.zeros((), device=device) for _ in blocks["decoder_cross"]]
    area = torch.zeros((), device=device)
    images = pairs = 0
    cross: dict[int, list[Tensor]] = {}  # of one batch, by layer: each image's (H, Q, S)
    grids: list[tuple[int, int]] = []

    def see(site: Site, layer: int, weights: Tensor, mask: Tensor) -> None:
        if site == "decoder_self":
            maps = list(weights)
        else:
            maps = measures.crop_padding(weights, mask, queries_too=site == "encoder_self")
        for image in maps:
            sums[site, layer] = sums[site, layer] + torch.stack([f(image).double() for f in MAP_MEASURES])  # (5, H)
        if site == "decoder_cross":
            cross[layer] = maps
            grids[:] = [(int((~m[:, 0]).sum()), int((~m[0]).sum())) for m in mask]

    with observe(detr, see):
        for micro_batch in batches:
            batch, targets = move_data_to_device(micro_batch, device)
            logits, boxes = detr(*normalize(batch))
            matches = match(DETROutput(logits[-1:], boxes[-1:]), pad_targets(targets), *costs)
            for number, target in enumerate(targets):
                mine = matches.image == number
                covered = measures.cover(target.boxes[matches.target[mine]], *grids[number])  # (P, S)
                area = area + covered.mean(1).sum()
                for layer, maps in cross.items():
                    shares = measures.share_inside(maps[number][:, matches.query[mine]], covered)  # (H, P)
                    inside[layer] = inside[layer] + shares.double().sum(1)
            images += len(targets)
            pairs += len(matches.query)
    assert images > 0, "statistics of no image"

    heads = []
    for site in SITES:
        for layer, block in enumerate(blocks[site]):
            alpha = block.alpha.tolist() if block.mapping == "entmax-learned" else [None] * block.heads
            known = site == "decoder_cross" and pairs > 0
            paibb = (inside[layer] / pairs).tolist() if known else [None] * block.heads
            columns = [*(sums[site, layer] / images).tolist(), paibb, alpha]
            for head, (zeros, near, support, entropy, gini, share, exponent) in enumerate(zip(*columns, strict=True)):
                place = (site, layer, head, block.mapping)
                heads.append(HeadStatistics(*place, zeros, near, support, entropy, gini, share, exponent))
    return AttentionStatistics(heads, images, pairs, area.item() / pairs if pairs else None)
