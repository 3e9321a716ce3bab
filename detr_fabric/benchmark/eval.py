"""Scoring 5,000 images with 100 detections each: hotcoco as called here beside pycocotools."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from detr_fabric.benchmark.measure import PartResult, interleaved, rows
from detr_fabric.evaluate.coco import Detections, Scores, score

QUERIES, CLASSES = 100, 80


def measure(device: torch.device, quick: bool) -> PartResult:
    """Times of one scoring on the CPU, whatever the device; a single round, for pycocotools takes a minute."""
    images = 50 if quick else 5000
    truth, detections = scenes(images)
    ids = list(range(1, images + 1))
    scores: dict[str, Scores] = {}

    def ours() -> None:
        scores["ours"] = score(truth, ids, detections, "hotcoco")

    def reference() -> None:
        scores["pycocotools"] = score(truth, ids, detections, "pycocotools")

    calls = {"ours": ours, "pycocotools": reference}
    times = interleaved(calls, 0, torch.device("cpu"), least=1, warm_up=False)
    apart = max(abs(value - scores["pycocotools"].stats[name]) for name, value in scores["ours"].stats.items())
    assert apart < 1e-12, f"the statistics differ by {apart}"
    found = rows(f"{images} images x {QUERIES}", times, images, "image")
    return PartResult([row | {"AP": scores[row["name"]].stats["AP"]} for row in found])


def scenes(images: int) -> tuple[dict[str, Any], list[Detections]]:
    """A ground truth with COCO's 7 objects an image, a few of them crowds, and detections of a middling model: a noisy
    box of three classes for every object, and boxes anywhere."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    detections = []
    for image in range(1, images + 1):
        count = int(min(60, rng.geometric(1 / 7)))
        corner, side = rng.uniform(0, 400, (count, 2)), rng.lognormal(4, 0.9, (count, 2)).clip(4, 240)
        labels = rng.integers(CLASSES, size=count)
        for label, (x, y), (w, h) in zip(labels.tolist(), corner.tolist(), side.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label + 1,
                    "bbox": [x, y, w, h],
                    "area": 0.6 * w * h,
                    "iscrowd": int(rng.random() < 0.01),
                }
            )
        source = rng.integers(count, size=QUERIES)
        offset = side[source] * rng.normal(0, 0.1, (QUERIES, 2))
        boxes = np.concatenate([corner[source] + offset, corner[source] + offset + side[source]], 1)
        known = rng.random(QUERIES) < 0.6
        found = np.where(known, labels[source], rng.integers(CLASSES, size=QUERIES))
        detections.append(
            Detections(
                image,
                torch.from_numpy(rng.random(QUERIES).astype(np.float32)),
                torch.from_numpy(found),
                torch.from_numpy(boxes.astype(np.float32)),
            )
        )
    truth = {
        "images": [{"id": number, "height": 640, "width": 640} for number in range(1, images + 1)],
        "categories": [{"id": number, "name": str(number)} for number in range(1, CLASSES + 1)],
        "annotations": annotations,
    }
    return truth, detections
