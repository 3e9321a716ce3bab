"""COCO's 12 statistics and per-class AP of a set of detections, by either library.

pycocotools is the reference, hotcoco gives the same numbers sooner. Both read the same ground truth and the same rows
of detections: neither loader's numbering or failure on empty lists comes into it. Q detections of an image, N of all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detr_fabric.errors import UserError

Backend = Literal["hotcoco", "pycocotools"]
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
    rows = _rows(by_image)
    rows = rows[np.isin(rows[:, 6], [category["id"] for category in ground_truth["categories"]])]
    with _silent():
        evaluation = (_reference if backend == "pycocotools" else _fast)(ground_truth, rows)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = dict(zip(STATS, map(float, evaluation.stats), strict=True))
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]  # (IoU, recall, class): all areas, 100 boxes
    per_class = {
        int(category) - 1: float(precision[:, :, k].mean())
        for k, category in enumerate(evaluation.params.catIds)
        if precision[0, 0, k] > -1
    }
    return Scores(stats, per_class)


def _rows(by_image: dict[int, Detections]) -> np.ndarray:
    """(N, 7) float64: image id, xywh, score, category id. Sides are float32 differences, as in the original."""
    found = by_image.values()
    if not found:
        return np.empty((0, 7))
    images = np.repeat(list(by_image), [len(one.scores) for one in found])
    corners = torch.cat([one.boxes for one in found]).float()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    scores, labels = (torch.cat([getattr(one, name) for one in found]) for name in ("scores", "labels"))
    return np.column_stack([images, boxes.double(), scores.double(), labels + 1])


def _fast(ground_truth: dict[str, Any], rows: np.ndarray) -> Any:
    """hotcoco's evaluation object."""
    from hotcoco import COCO, COCOeval

    truth = COCO(ground_truth)
    return COCOeval(truth, truth.load_res(rows), "bbox")


def _reference(ground_truth: dict[str, Any], rows: np.ndarray) -> Any:
    """pycocotools' evaluation object, which has the same methods. It writes into annotations, and fails on no rows."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = [
        {
            "id": number,
            "image_id": int(image),
            "category_id": int(category),
            "bbox": box,
            "area": box[2] * box[3],
            "score": value,
            "iscrowd": 0,
        }
        for number, (image, *box, value, category) in enumerate(rows.tolist(), start=1)
    ]
    sides = []
    for boxes in ([*map(dict, ground_truth["annotations"])], results):
        coco = COCO()
        coco.dataset = {**ground_truth, "annotations": boxes}
        coco.createIndex()
        sides.append(coco)
    return COCOeval(*sides, iouType="bbox")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Both libraries print a table."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
