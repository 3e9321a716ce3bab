"""What a model finds in a data set, over all ranks, and how well that scores.

Shapes: B batch, Q queries.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import nn

from detr_fabric.batch import normalize
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.data.coco import CocoDetection
from detr_fabric.data.loader import EvalLoader, MicroBatch
from detr_fabric.errors import UserError
from detr_fabric.model.detr import post_process
from detr_fabric.output import replace_text
from detr_fabric.pictures import Boxes, Picture
from detr_fabric.scoring import Detections, score
from detr_fabric.signals import Preempted, Preemption


class Evaluation(NamedTuple):
    """The scores of one pass over a data set and the detections behind them."""

    stats: dict[str, float]  # COCO's 12 by name, -1 where undefined
    per_class: dict[str, float]  # AP by class name, best first
    detections: list[Detections]  # one an image, in the data set's order
    faults: list[str]  # of the images that could not be read, which count as images without detections
    seconds: float  # detecting and scoring
    seconds_scoring: float


@torch.no_grad()
def detect(
    fabric: Fabric, model: nn.Module, loader: EvalLoader, preemption: Preemption | None = None
) -> list[Detections]:
    """The detections of this rank's images, in pixels of the files. Raises Preempted as evaluate does."""
    model.eval()
    found = []
    for micro_batch in loader:
        found += detect_batch(fabric, model, micro_batch)
        if preemption is not None and preemption.agreed(fabric):
            raise Preempted
    return found


@torch.no_grad()
def detect_batch(fabric: Fabric, model: nn.Module, micro_batch: MicroBatch) -> list[Detections]:
    """What a model in evaluation mode finds: for every image the answers of all queries, in their order;
    nothing where the image could not be read."""
    batch, targets = fabric.to_device(micro_batch)
    outputs = model(*normalize(batch))
    sizes = torch.tensor([target.orig_size for target in targets], device=fabric.device)
    answer = post_process(outputs.pred_logits[-1], outputs.pred_boxes[-1], sizes)
    found = []
    for target, scores, labels, boxes in zip(targets, *(part.cpu() for part in answer), strict=True):
        kept = slice(None) if target.fault is None else slice(0)
        found.append(Detections(target.image_id, scores[kept], labels[kept], boxes[kept], target.fault))
    return found


def evaluate(
    fabric: Fabric,
    model: nn.Module,
    loader: EvalLoader,
    dataset: CocoDetection,
    backend: Literal["hotcoco", "pycocotools"],
    preemption: Preemption | None = None,
) -> Evaluation | None:
    """Detects on every rank and scores on rank 0; None on the others. Leaves the model in evaluation mode.

    Raises Preempted on every rank when one of them was asked to stop, if `preemption` is given.
    """
    started = time.perf_counter()
    found = detect(fabric, model, loader, preemption)
    if fabric.world_size > 1:
        shares: list[Any] | None = [None] * fabric.world_size if fabric.is_global_zero else None
        torch.distributed.gather_object(found, shares)
        if shares is None:
            return None
        found = [detections for share in shares for detections in share]
    by_image = {detections.image_id: detections for detections in found}  # drops what sharding repeated
    found = [by_image[image_id] for image_id in dataset.image_ids]
    faults = [detections.fault for detections in found if detections.fault is not None]
    if len(faults) == len(found):
        raise UserError(f"{faults[0]} (nor can any other image be read: check the folder {dataset.folder})")
    scoring = time.perf_counter()
    scores = score(dataset.ground_truth(), dataset.image_ids, found, backend)
    ended = time.perf_counter()
    ranking = sorted(scores.per_class.items(), key=lambda item: -item[1])
    per_class = {dataset.categories.name(label): ap for label, ap in ranking}
    return Evaluation(scores.stats, per_class, found, faults, ended - started, ended - scoring)


def picture_panel(
    dataset: CocoDetection, detections: Sequence[Detections], indices: Iterable[int], threshold: float
) -> list[Picture]:
    """Images with their detections of at least a score and their true boxes, in pixels as evaluated."""
    pictures = []
    for index in indices:
        found = detections[index]
        image, target = dataset[(0, index)]
        height, width = target.size
        kept = found.scores >= threshold
        scale = torch.tensor([width / target.orig_size[1], height / target.orig_size[0]]).repeat(2)
        true = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height]).repeat(2)
        pictures.append(
            Picture(
                image,
                str(found.image_id),
                Boxes(found.boxes[kept] * scale, found.labels[kept], found.scores[kept]),
                Boxes(true, target.labels),
            )
        )
    return pictures


def save_evaluation(path: Path, evaluation: Evaluation, step: int, more: Mapping[str, Any] | None = None) -> None:
    """Writes the scores, and `more`, as JSON, replacing an earlier file whole."""
    content = {"step": step, **evaluation.stats, "AP_class": evaluation.per_class, "seconds": evaluation.seconds}
    content |= more or {}
    replace_text(path, json.dumps(content, indent=1) + "\n")
