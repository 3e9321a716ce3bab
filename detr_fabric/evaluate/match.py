"""Detections matched with objects as COCO does at one IoU: what is right, false and missed, at any score.

Shapes: I images, M detections, N objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from hotcoco import COCO, COCOeval

from detr_fabric.data.formats.annotations import Annotations
from detr_fabric.data.ground_truth import ground_truth
from detr_fabric.evaluate.coco import Detections, rows_of

IOU = 0.5  # smallest overlap of a match


class Objects(NamedTuple):
    """The ground truth without crowds."""

    image: np.ndarray  # (N,) int64 number of the image, from 0; ascending
    boxes: np.ndarray  # (N, 4) float64 xywh
    labels: np.ndarray  # (N,) int64


class DetectionMatches(NamedTuple):
    """Detections in the order of the images, those of an image in the model's order, and what each has found.

    Left out are crowds and the detections that COCO ignores: unmatched ones of which half lies in a crowd of their
    class, and those of a class in an image beyond the best 100.
    """

    image: np.ndarray  # (M,) int64 number of the image, from 0; ascending
    boxes: np.ndarray  # (M, 4) float64 xywh
    labels: np.ndarray  # (M,) int64
    scores: np.ndarray  # (M,) float64
    object: np.ndarray  # (M,) int64 the object of its class that a detection matches, -1: none
    there: Objects
    images: int

    @property
    def right(self) -> np.ndarray:
        """(M,) whether a detection matches an object."""
        return self.object >= 0

    def by_image(self) -> Iterator[tuple[slice, slice]]:
        """The detections and the objects of each image."""
        edges = np.arange(self.images + 1)
        at, there = np.searchsorted(self.image, edges), np.searchsorted(self.there.image, edges)
        for number in range(self.images):
            yield slice(at[number], at[number + 1]), slice(there[number], there[number + 1])


def counted(matches: DetectionMatches, classes: int) -> COCOeval:
    """hotcoco's evaluation, not run yet, of the detections and objects that count alone; categories are label + 1."""
    there = matches.there
    images = [{"id": number + 1} for number in range(matches.images)]
    categories = [{"id": label + 1, "name": str(label)} for label in range(classes)]
    truth = COCO.from_arrays(images, categories, there.image + 1, there.labels + 1, there.boxes)
    columns = (matches.image + 1, matches.boxes, matches.scores, matches.labels + 1)
    return at_one_iou(COCOeval(truth, truth.load_res(np.column_stack(columns)), "bbox"))


def at_one_iou(evaluation: COCOeval) -> COCOeval:
    evaluation.params.iou_thrs = [IOU]
    evaluation.params.area_rng, evaluation.params.area_rng_lbl = [[0, 1e10]], ["all"]
    return evaluation


class Outcome(NamedTuple):
    """How one image went, counting detections that score a threshold or more."""

    right: int  # detections that match an object
    false: int  # those that match none
    missed: np.ndarray  # the objects without a match, as indices of DetectionMatches.there

    @property
    def objects(self) -> int:
        return self.right + len(self.missed)

    @property
    def mistakes(self) -> int:
        """False detections and missed objects; an object found under another class is both."""
        return self.false + len(self.missed)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 where there is nothing, and nothing is found."""
        total = 2 * self.right + self.mistakes
        return 2 * self.right / total if total else 1.0


def match(
    annotations: Annotations, detections: Sequence[Detections], labels: frozenset[int] | None = None
) -> DetectionMatches:
    """Matches the detections of each of the annotations' images, given in their order, with its objects.

    COCO's rule: by descending score, each detection takes the object of its class in its image that it overlaps most
    among those left, if their IoU is at least IOU. A threshold of scores that is set afterwards changes no match of a
    detection above it. Detections of a class that is not among `labels`, because the data has no annotations for it,
    are neither right nor wrong and left out.
    """
    truth = ground_truth(annotations)
    rows = rows_of(dict(enumerate(detections, start=1)))
    known = [category["id"] - 1 for category in truth["categories"]] if labels is None else list(labels)
    rows = rows[np.isin(rows[:, 6] - 1, known)]
    index = COCO(truth)
    evaluation = at_one_iou(COCOeval(index, index.load_res(rows), "bbox"))
    evaluation.evaluate()
    status = evaluation.image_diagnostics(IOU, score_thr=2.0)  # ids count from 1; no search for wrong annotations
    counts, partner = np.zeros(len(rows), bool), np.full(len(rows), -1)
    counts[np.fromiter(status["dt_status"], np.int64) - 1] = True
    partner[np.fromiter(status["dt_match"], np.int64) - 1] = [*status["dt_match"].values()]
    objects = [each for each in truth["annotations"] if not each["iscrowd"]]
    ids, image, label = (
        np.array([each[key] for each in objects], np.int64) for key in ("id", "image_id", "category_id")
    )
    there = Objects(image - 1, np.array([each["bbox"] for each in objects], float).reshape(-1, 4), label - 1)
    numbers, rows = np.full(len(annotations.labels) + 1, -1), rows[counts]
    numbers[ids] = np.arange(len(ids))
    found = np.where(partner[counts] < 0, -1, numbers[partner[counts]])
    return DetectionMatches(
        rows[:, 0].astype(int) - 1, rows[:, 1:5], rows[:, 6].astype(int) - 1, rows[:, 5], found, there, len(annotations)
    )


def outcomes(matches: DetectionMatches, threshold: float) -> list[Outcome]:
    """How each image went."""
    counts, made = matches.scores >= threshold, []
    for at, there in matches.by_image():
        found = matches.object[at][counts[at]]
        missed = np.setdiff1d(np.arange(there.start, there.stop), found)
        made.append(Outcome(int((found >= 0).sum()), int((found < 0).sum()), missed))
    return made
