"""What one model did with one image: its predictions and its attention.

Shapes: H×W image, h×w features, L layers, H heads, Q queries, N objects of the ground truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_fabric.analysis.capture import SITES, Site, mapping_names, observe, unwrap
from detr_fabric.analysis.measures import crop_padding
from detr_fabric.data.batch import ImageBatch, normalize
from detr_fabric.model.detr import DETROutput, post_process


class AttentionMaps(NamedTuple):
    """What one model did with one image, on the CPU."""

    model: str  # its name
    mapping: str  # its mappings
    image: Tensor  # (3, H, W) uint8 RGB
    scores: Tensor  # (Q,) of the best class that is an object
    labels: Tensor  # (Q,)
    boxes: Tensor  # (Q, 4) predicted, xyxy in [0, 1]
    cross: Tensor  # (L, H, Q, h, w) cross-attention, without padding
    class_names: Sequence[str]
    gt_labels: Tensor = torch.zeros(0, dtype=torch.int64)  # (N,)
    gt_boxes: Tensor = torch.zeros(0, 4)  # (N, 4) xyxy in [0, 1]
    matched: Mapping[int, int] = {}  # object → the query matched to it; not every object, if queries are fewer


class Attention(NamedTuple):
    """The attention weights of one image without padding, float32 on the CPU; an empty tensor where a model has no such
    layer, or it was left out.

    The h×w cells divide the image evenly: cell (i, j) covers rows i·H/h to (i+1)·H/h. Weights sum to 1 over the keys,
    where the mapping makes them so.
    """

    encoder_self: Tensor  # (L, H, h, w, h, w): what the token of a cell, the first h, w, reads of each cell, the last
    decoder_self: Tensor  # (L, H, Q, Q): what a query, the first Q, reads of each query, the last
    decoder_cross: Tensor  # (L, H, Q, h, w): what a query reads of each cell


@torch.no_grad()
def attention(model: nn.Module, batch: ImageBatch, sites: Sequence[Site] = SITES) -> tuple[Attention, DETROutput]:
    """Runs the model on a batch of one image: its attention at these sites, and its output."""
    layers: dict[Site, list[Tensor]] = {site: [] for site in SITES}

    def keep(site: Site, layer: int, weights: Tensor, mask: Tensor) -> None:
        if site not in sites:
            return
        (image,) = weights.float()
        if site != "decoder_self":
            grid = int((~mask[0, :, 0]).sum()), int((~mask[0, 0]).sum())
            image = crop_padding(image[None], mask, queries_too=site == "encoder_self")[0].unflatten(-1, grid)
            image = image.unflatten(1, grid) if site == "encoder_self" else image
        layers[site].append(image.cpu())

    with observe(model, keep) as detr:
        output = DETROutput(*detr(*normalize(batch)))
    return Attention(*(torch.stack(layers[site]) if layers[site] else torch.zeros(0) for site in SITES)), output


@torch.no_grad()
def attention_maps(
    model: nn.Module, name: str, image: Tensor, batch: ImageBatch, class_names: Sequence[str]
) -> tuple[AttentionMaps, DETROutput]:
    """Runs the model on the batch of one image (3, H, W): its maps, without the ground truth, and its output."""
    seen, output = attention(model, batch, ("decoder_cross",))
    boxes = output.pred_boxes[-1]
    unit = torch.ones(1, 2, device=boxes.device)
    detr = unwrap(model)
    detected = post_process(output.pred_logits[-1], boxes, unit, detr.focal)
    scores, labels, corners = (each[0].cpu() for each in detected)
    mapping = mapping_names(detr)
    return AttentionMaps(name, mapping, image, scores, labels, corners, seen.decoder_cross, class_names), output
