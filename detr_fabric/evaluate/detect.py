"""Evaluation: detect on every rank, gather, score on rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from lightning_fabric import Fabric
from torch import nn

from detr_fabric.data.batch import MicroBatch, Target, normalize
from detr_fabric.data.ground_truth import ground_truth
from detr_fabric.data.loader import EvalLoader
from detr_fabric.errors import UserError
from detr_fabric.evaluate.coco import Backend, Detections, score
from detr_fabric.evaluate.topk import top_detections
from detr_fabric.model.detr import DETROutput, post_process

Watch = Callable[[DETROutput, list[Target]], object]
"""Called with what the model says about each batch: for progress, validation losses, or to stop by an exception."""


class Evaluation(NamedTuple):
    """The scores of one pass over a data set and the detections behind them."""

    stats: dict[str, float]  # COCO's 12 by name, -1 where undefined
    per_class: dict[str, float]  # AP by class name, best first
    detections: list[Detections]  # one per image, in the data set's order
    read_errors: list[str]  # why images could not be read; they count as images without detections
    seconds: float  # detecting and scoring
    seconds_scoring: float


def evaluate(
    fabric: Fabric, model: nn.Module, loader: EvalLoader, backend: Backend, watch: Watch | None = None, topk: int = 100
) -> Evaluation | None:
    """Detects on every rank and scores on rank 0; None on the others. Leaves the model in evaluation mode.

    Raises UserError if no image can be read, and what `watch` raises.
    """
    started = time.perf_counter()
    found = gather(fabric, detect(fabric, model, loader, watch, topk))
    if found is None:
        return None
    dataset = loader.dataset
    by_image = {detections.image_id: detections for detections in found}  # drops the images that sharding repeated
    found = [by_image[image_id] for image_id in dataset.image_ids]
    errors = [detections.read_error for detections in found if detections.read_error is not None]
    if len(errors) == len(found):
        raise UserError(f"{errors[0]} (nor can any other image be read: check the folder {dataset.folder})")
    scoring = time.perf_counter()
    stats, per_label = score(ground_truth(dataset.annotations), dataset.image_ids, found, backend)
    ended = time.perf_counter()
    best_first = sorted(per_label, key=lambda label: -per_label[label])
    per_class = {dataset.categories.name(label): per_label[label] for label in best_first}
    return Evaluation(stats, per_class, found, errors, ended - started, ended - scoring)


def detect(
    fabric: Fabric, model: nn.Module, loader: EvalLoader, watch: Watch | None = None, topk: int = 100
) -> list[Detections]:
    """The detections of this rank's images, in pixels of the files."""
    model.eval()
    return [found for micro_batch in loader for found in detect_batch(fabric, model, micro_batch, watch, topk)]


@torch.no_grad()
def detect_batch(
    fabric: Fabric, model: nn.Module, micro_batch: MicroBatch, watch: Watch | None = None, topk: int = 100
) -> list[Detections]:
    """The detections of all queries, in their order, for every image; none for an image that could not be read.

    A model with focal loss gives the topk best of all queries and classes instead.
    """
    batch, targets = fabric.to_device(micro_batch)
    outputs = model(*normalize(batch))
    if watch is not None:
        watch(outputs, targets)
    sizes = torch.tensor([target.orig_size for target in targets], device=fabric.device)
    last = outputs.pred_logits[-1], outputs.pred_boxes[-1], sizes
    detected = top_detections(*last, topk) if getattr(model, "focal", False) else post_process(*last)
    found = []
    for target, *parts in zip(targets, *(part.cpu() for part in detected), strict=True):
        kept = slice(0 if target.read_error is not None else None)
        # clones: a view would take its whole batch along when it is sent to rank 0
        scores, labels, boxes, *queries = (part[kept].clone() for part in parts)
        found.append(Detections(target.image_id, scores, labels, boxes, target.read_error, *queries))
    return found


def gather(fabric: Fabric, found: list[Detections]) -> list[Detections] | None:
    """The detections of all ranks, on rank 0; None on the others."""
    if fabric.world_size == 1:
        return found
    shares: list[list[Detections]] | None = [[]] * fabric.world_size if fabric.is_global_zero else None
    torch.distributed.gather_object(found, shares)
    return None if shares is None else [detections for share in shares for detections in share]
