"""COCO's 12 statistics and per-class AP of a set of detections, by either library.

pycocotools is the reference, faster-coco-eval gives the same numbers sooner. Both read the same two COCO objects, built
here: neither loader's rounding, numbering or failure on empty lists comes into it. Q detections of an image.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detr_fabric.errors import UserError

Backend = Literal["faster-coco-eval", "pycocotools"]
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class Detections(NamedTuple):
    """What a model found in one image, on the CPU."""

    image_id: int | str  # the data set's own id
    scores: Tensor  # (Q,) float32
    labels: Tensor  # (Q,) int64, contiguous class ids
    boxes: Tensor  # (Q, 4) float32 xyxy, in pixels of the original image
    fault: str | None = None  # why there are none: the image could not be read


class Scores(NamedTuple):
    """The numbers of one evaluation, in [0, 1]."""

    stats: dict[str, float]  # STATS by name; -1 where the ground truth has no object to define one, as in pycocotools
    per_class: dict[int, float]  # label → AP; classes without ground truth, or with crowds only, are absent


def score(
    ground_truth: dict[str, Any],
    image_ids: Sequence[int | str],
    detections: Sequence[Detections],
    backend: Backend,
) -> Scores:
    """Scores detections against a COCO-format ground truth, which stays as it is.

    ground_truth: images with ids 1..N in the order of image_ids, category ids = label + 1, annotation ids from 1 (both
    libraries read 0 as unmatched), every annotation with bbox (xywh), area and iscrowd.
    An image that comes twice, because sharding repeats some, counts once: the first wins. Images without detections,
    or no detections at all, score 0. Labels without a category are dropped, as pycocotools does.
    Raises UserError for an image that is not in image_ids, and for values that are not finite: pycocotools gives a
    model that predicts NaN boxes an AP of 0.69.
    """
    position = {image_id: number for number, image_id in enumerate(image_ids, start=1)}
    by_image: dict[int, Detections] = {}
    for found in detections:
        if found.image_id not in position:
            raise UserError(f"detections of image {found.image_id}: the annotations have no such image")
        if not (found.scores.isfinite().all() and found.boxes.isfinite().all()):
            raise UserError(f"detections of image {found.image_id} are not finite: the model's weights have diverged")
        by_image.setdefault(position[found.image_id], found)
    annotations = [
        {key: annotation[key] for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")}
        for annotation in ground_truth["annotations"]
    ]
    with _silent(), _without_garbage_collection():
        evaluation = _evaluate(ground_truth, annotations, _results(by_image), backend)
    stats = dict(zip(STATS, map(float, evaluation.stats[: len(STATS)]), strict=True))
    precision = np.asarray(evaluation.eval["precision"])[
        :, :, :, 0, -1
    ]  # (IoU, recall, class): all areas, 100 detections
    per_class = {
        int(category) - 1: float(precision[:, :, k].mean())
        for k, category in enumerate(evaluation.params.catIds)
        if precision[0, 0, k] > -1
    }
    return Scores(stats, per_class)


def _evaluate(
    ground_truth: dict[str, Any], annotations: list[dict[str, Any]], results: list[dict[str, Any]], backend: Backend
) -> Any:
    """A library's evaluation object after its three steps; the two libraries have the same interface."""
    if backend == "pycocotools":
        from pycocotools import coco as index
        from pycocotools.cocoeval import COCOeval as evaluator
    else:
        from faster_coco_eval.core import coco as index
        from faster_coco_eval.core.faster_eval_api import COCOeval_faster as evaluator
    sides = []
    for boxes in (annotations, results):
        coco = index.COCO()
        coco.dataset = {key: ground_truth[key] for key in ("images", "categories")} | {"annotations": boxes}
        coco.createIndex()
        sides.append(coco)
    evaluation = evaluator(*sides, iouType="bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _results(by_image: dict[int, Detections]) -> list[dict[str, Any]]:
    """Detections as COCO annotations. Widths and heights are float32 differences, as the original computes them."""
    if not by_image:
        return []
    images = [number for number, found in by_image.items() for _ in range(len(found.scores))]
    labels = torch.cat([found.labels for found in by_image.values()]).tolist()
    scores = torch.cat([found.scores for found in by_image.values()]).tolist()
    corners = torch.cat([found.boxes for found in by_image.values()]).float()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()  # xywh
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": label + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "score": value,
            "iscrowd": 0,
        }
        for number, (image, label, box, value) in enumerate(zip(images, labels, boxes, scores, strict=True), start=1)
    ]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """pycocotools prints each step and a table."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Half a million small dicts set the collector off again and again: a third of faster-coco-eval's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
