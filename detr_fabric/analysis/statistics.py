"""The measures of every attention head over a set of images: as curves, as a table, and for the report.

Shapes: B batch, H heads, Q queries, P matched pairs of an image. Layers and heads count from 0, as in the state dict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn

from detr_fabric.analysis import measures
from detr_fabric.analysis.capture import SITES, Site, attention_blocks, observe, unwrap
from detr_fabric.config import CrossMapping
from detr_fabric.data.batch import ImageBatch, Size, Target, normalize, pad_images
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.loss.matcher import HungarianMatcher, pad_targets
from detr_fabric.model.detr import DETROutput

MAP_MEASURES = {
    "zeros": measures.zeros,
    "near_zeros": measures.near_zeros,
    "support": measures.support,
    "entropy": measures.entropy,
    "gini": measures.gini,
    "gini_rows": measures.gini_rows,
}


class HeadStatistics(NamedTuple):
    """One attention head. Measures of a map are means over images, each without its padding (see measures.py)."""

    site: Site
    layer: int
    head: int
    mapping: CrossMapping
    zeros: float  # part of the weights that are exactly 0
    near_zeros: float  # part of the weights of at most 1e-6, exact zeros included
    support: float  # keys with a weight other than 0, of a query
    entropy: float  # nats, of a query
    gini: float  # of the whole map
    gini_rows: float  # of a query
    paibb: float | None  # cross-attention: mass inside the true box, mean over matched pairs; None without pairs
    alpha: float | None  # the learned exponent, where there is one


class ImageRecord(NamedTuple):
    """One layer's maps in one image. Measures are means over heads."""

    image_id: int | str
    site: Site
    layer: int
    zeros: float
    near_zeros: float
    support: float
    entropy: float
    gini: float
    gini_rows: float


class PairRecord(NamedTuple):
    """A query of the last layer and the object it is matched to."""

    image_id: int | str
    query: int
    object: int  # its number among the image's objects, without crowds
    area: float  # of the object, in pixels of the file: its box's
    paibb: float  # of the last layer, mean over heads
    paibb_enlarged: float  # of the last layer's head-averaged map, enlarged to the model's input


class AttentionStatistics(NamedTuple):
    """All heads of a model over some images."""

    heads: list[HeadStatistics]
    image_records: list[ImageRecord]
    pair_records: list[PairRecord]
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
            for measure in (*MAP_MEASURES, "paibb"):
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
        f"alpha/{site}/layer{layer}": block.learned()["alpha"].mean().item()
        for site, blocks in attention_blocks(unwrap(model)).items()
        for layer, block in enumerate(blocks)
        if "alpha" in block.learned()
    }


def sample(dataset: CocoDetection, count: int) -> Iterator[tuple[ImageBatch, list[Target]]]:
    """Up to `count` images spread evenly over a data set, one at a time: the same ones at every call."""
    count = min(count, len(dataset))
    for number in range(count):
        image, target = dataset[(0, number * len(dataset) // count)]
        yield pad_images([image]), [target]


@torch.no_grad()
def attention_statistics(
    model: nn.Module, batches: Iterable[tuple[ImageBatch, list[Target]]], matcher: HungarianMatcher
) -> AttentionStatistics:
    """The statistics of a model's attention over batches as the loaders give them (at least one image).

    model: as it is or wrapped by Fabric; computed in float32 on its device, in this process alone, without collectives.
    It is left in evaluation mode. PAIBB is of the pairs that the last layer's predictions are matched in, in every
    layer: does what becomes this object's query look at the object?
    """
    detr = unwrap(model).eval()
    device = detr.query_embed.weight.device
    blocks = attention_blocks(detr)
    seen: dict[tuple[Site, int], list[Tensor]] = {
        (site, layer): [] for site in SITES for layer in range(len(blocks[site]))
    }  # each image's (measures, H)
    inside = [torch.zeros((), device=device) for _ in blocks["decoder_cross"]]
    image_ids: list[int | str] = []
    pair_records: list[PairRecord] = []
    area = torch.zeros((), device=device)
    cross: dict[int, list[Tensor]] = {}  # of one batch, by layer: each image's (H, Q, S)
    grids: list[Size] = []

    def see(site: Site, layer: int, weights: Tensor, mask: Tensor) -> None:
        if site == "decoder_self":
            maps = list(weights)
        else:
            maps = measures.crop_padding(weights, mask, queries_too=site == "encoder_self")
        seen[site, layer] += [torch.stack([f(image).double() for f in MAP_MEASURES.values()]) for image in maps]
        if site == "decoder_cross":
            cross[layer] = maps
            grids[:] = [(int((~m[:, 0]).sum()), int((~m[0]).sum())) for m in mask]

    with observe(detr, see):
        for micro_batch in batches:
            batch, targets = move_data_to_device(micro_batch, device)
            logits, boxes = detr(*normalize(batch))
            matches = matcher(DETROutput(logits[-1:], boxes[-1:]), pad_targets(targets))
            for number, target in enumerate(targets):
                mine = matches.image == number
                queries, objects = matches.query[mine], matches.target[mine]
                covered = measures.cover(target.boxes[objects], *grids[number])  # (P, S)
                area = area + covered.mean(1).sum()
                for layer, maps in cross.items():
                    shares = measures.share_inside(maps[number][:, queries], covered)  # (H, P)
                    inside[layer] = inside[layer] + shares.double().sum(1)
                pair_records += _pairs(target, queries, objects, shares, maps[number], grids[number])
            image_ids += [target.image_id for target in targets]
    assert image_ids, "statistics of no image"

    heads, image_records = [], []
    pairs = len(pair_records)
    for site in SITES:
        for layer, block in enumerate(blocks[site]):
            learned = block.learned()
            alpha = learned["alpha"].tolist() if "alpha" in learned else [None] * block.heads
            known = site == "decoder_cross" and pairs > 0
            paibb = (inside[layer] / pairs).tolist() if known else [None] * block.heads
            every = torch.stack(seen[site, layer])  # (images, measures, H)
            for head, values in enumerate(zip(*every.mean(0).tolist(), paibb, alpha, strict=True)):
                heads.append(HeadStatistics(site, layer, head, block.mapping, *values))
            for image_id, means in zip(image_ids, every.mean(2).tolist(), strict=True):
                image_records.append(ImageRecord(image_id, site, layer, *means))
    box_area = area.item() / pairs if pairs else None
    return AttentionStatistics(heads, image_records, pair_records, len(image_ids), pairs, box_area)


def _pairs(
    target: Target, queries: Tensor, objects: Tensor, shares: Tensor, maps: Tensor, grid: Size
) -> list[PairRecord]:
    """The matched pairs of an image: (P,) queries and objects, the last layer's shares (H, P) and maps (H, Q, S)."""
    boxes = target.boxes[objects]
    enlarged = measures.share_inside_enlarged(maps[:, queries].mean(0), boxes, grid, target.size)
    areas = boxes[:, 2:].prod(-1) * math.prod(target.orig_size)
    columns = (queries, objects, areas, shares.mean(0), enlarged)
    return [PairRecord(target.image_id, *pair) for pair in zip(*(c.tolist() for c in columns), strict=True)]
