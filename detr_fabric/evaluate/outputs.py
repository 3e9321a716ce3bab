"""What an evaluation leaves behind: its scores as JSON, and images with detections and ground truth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.draw import Boxes, Picture
from detr_fabric.evaluate.coco import Detections
from detr_fabric.evaluate.detect import Evaluation
from detr_fabric.runtime.files import replace_text


def save_evaluation(
    path: Path, evaluation: Evaluation, step: int | None, more: Mapping[str, Any] | None = None
) -> None:
    """Writes the scores, and `more`, as JSON, replacing an earlier file whole."""
    content = {"step": step, **evaluation.stats, "AP_class": evaluation.per_class, "seconds": evaluation.seconds}
    replace_text(path, json.dumps(content | dict(more or {}), indent=1) + "\n")


def picture_panel(
    dataset: CocoDetection, detections: Sequence[Detections], indices: Iterable[int], threshold: float
) -> list[Picture]:
    """Images, resized as for the model, with their ground truth and the detections that score `threshold` or more."""
    pictures = []
    for index in indices:
        found = detections[index]
        image, target = dataset[(0, index)]
        height, width = target.size
        kept = found.scores >= threshold
        scale = torch.tensor([width / target.orig_size[1], height / target.orig_size[0]]).repeat(2)
        predicted = Boxes(found.boxes[kept] * scale, found.labels[kept], found.scores[kept])
        ground_truth = Boxes(cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height]).repeat(2), target.labels)
        pictures.append(Picture(image, str(found.image_id), predicted, ground_truth))
    return pictures
