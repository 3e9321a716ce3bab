"""COCO's 12 statistics and the AP of each class.

hotcoco and pycocotools, the reference, give the same numbers from the same ground truth and rows of detections.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detr_fabric.errors import UserError

Backend = Literal["hotcoco", "pycocotools"]
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class Detections(NamedTuple):
    """What a model detects in one image, on the CPU; Q queries."""

    image_id: int | str  # the data set's own id
    scores: Tensor  # (Q,) float32
    labels: Tensor  # (Q,) int64, contiguous class ids
    boxes: Tensor  # (Q, 4) float32 xyxy, in pixels of the original image
    read_error: str | None = None  # why there are none: the image could not be read
    queries: Tensor | None = None  # (Q,) which query found each; None: one each, in their order


class Scores(NamedTuple):
    """The numbers of one evaluation, in [0, 1]."""

    stats: dict[str, float]  # STATS by name; -1 where the ground truth has no object to define one, as in pycocotools
    per_class: dict[int, float]  # label → AP; classes without ground truth, or with crowds only, are absent


def score(
    ground_truth: dict[str, Any], image_ids: Sequence[int | str], detections: Sequence[Detections], backend: Backend
) -> Scores:
    """Scores detections against a COCO-format ground truth, which is left unchanged.

    ground_truth: images with ids 1..N in the order of image_ids, category ids = label + 1, annotation ids from 1 (both
    libraries read 0 as unmatched), every annotation with bbox (xywh), area and iscrowd.
    Of an image that occurs twice the first detections count. Labels without a category are dropped, as in pycocotools.
    Raises UserError for an image that is not in image_ids, and for values that are not finite, which pycocotools
    scores: a model that predicts NaN boxes gets an AP of 0.69.
    """
    position = {image_id: number for number, image_id in enumerate(image_ids, start=1)}
    by_image: dict[int, Detections] = {}
    for found in detections:
        if found.image_id not in position:
            raise UserError(f"detections of image {found.image_id}: the annotations have no such image")
        if not (found.scores.isfinite().all() and found.boxes.isfinite().all()):
            raise UserError(f"detections of image {found.image_id} are not finite: the model's weights have diverged")
        by_image.setdefault(position[found.image_id], found)
    rows = rows_of(by_image)
    rows = rows[np.isin(rows[:, 6], [category["id"] for category in ground_truth["categories"]])]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # both libraries print a table
        evaluation = (_pycocotools if backend == "pycocotools" else _hotcoco)(ground_truth, rows)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = dict(zip(STATS, map(float, evaluation.stats), strict=True))
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]  # (IoU, recall, class): all areas, 100 boxes
    defined = [(k, id) for k, id in enumerate(evaluation.params.catIds) if precision[0, 0, k] > -1]
    return Scores(stats, {int(id) - 1: float(precision[:, :, k].mean()) for k, id in defined})


def rows_of(by_image: dict[int, Detections]) -> np.ndarray:
    """(N, 7) float64: image id, xywh, score, category id. Widths are float32 differences, as in the original."""
    if not by_image:
        return np.empty((0, 7))
    images = np.repeat(list(by_image), [len(found.scores) for found in by_image.values()])
    _, scores, labels, boxes, *_ = (list(column) for column in zip(*by_image.values(), strict=True))
    corners = torch.cat(boxes)
    xywh = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    return np.column_stack([images, xywh.double(), torch.cat(scores).double(), torch.cat(labels) + 1])


def _hotcoco(ground_truth: dict[str, Any], rows: np.ndarray) -> Any:
    from hotcoco import COCO, COCOeval

    truth = COCO(ground_truth)
    return COCOeval(truth, truth.load_res(rows), "bbox")


def _pycocotools(ground_truth: dict[str, Any], rows: np.ndarray) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), COCO()
    truth.dataset = {**ground_truth, "annotations": [*map(dict, ground_truth["annotations"])]}  # it changes them
    found.dataset = {**ground_truth, "annotations": []}
    for index in (truth, found):
        index.createIndex()
    return COCOeval(truth, truth.loadRes(rows) if len(rows) else found, iouType="bbox")  # loadRes fails on no rows
