"""What the 12 statistics don't say: the best threshold, duplicates, calibration, and the kinds of errors.

All of it is computed with hotcoco's matches, IoU and curves, whichever library scores. hotcoco's own `f_scores` gives a
mean over classes of F1 along the interpolated curve, without thresholds.

Shapes: M detections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from hotcoco.metrics import calibration_curve, calibration_error
from hotcoco.primitives import bbox_iou

from detr_fabric.data.formats.categories import Categories
from detr_fabric.evaluate.match import IOU, DetectionMatches, counted
from detr_fabric.terminal import decimal

THRESHOLD = 0.5  # score of the detections among which duplicates are counted, unless another is named
DUPLICATE = 0.8  # smallest overlap of duplicates
BINS = 10  # of scores
BACKGROUND = 0.1  # largest overlap with an object of a detection of background
KINDS = {
    "localisation": "Loc",
    "classification": "Cls",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}


class BestF1(NamedTuple):
    """Precision and recall where F1 is highest; without a detection that is right, 0 at no threshold."""

    f1: float
    threshold: float | None
    precision: float | None
    recall: float
    objects: int


def diagnose(matches: DetectionMatches, categories: Categories, threshold: float = THRESHOLD) -> dict[str, Any]:
    """The figures as JSON: {F1, F1_class, duplicates, calibration, tide}; threshold: that of `duplicates`.

    `F1` takes one threshold for all classes together. Classes without objects are absent from `F1_class`.
    """
    there = matches.there.labels
    by_class = {}
    for label in np.unique(there).tolist():
        own = matches.labels == label
        best = best_f1(matches.scores[own], matches.right[own], int((there == label).sum()))
        by_class[categories.name(label)] = best._asdict()
    return {
        "F1": best_f1(matches.scores, matches.right, len(there))._asdict(),
        "F1_class": by_class,
        "duplicates": duplicates(matches, threshold),
        "calibration": calibration(matches),
        "tide": tide(matches, categories.num_classes),
    }


def best_f1(scores: np.ndarray, right: np.ndarray, objects: int) -> BestF1:
    """The threshold t at which F1 = 2·TP / (D + N) is highest, the higher of two equal ones: of the D detections that
    score t or more, TP are right; N objects. Precision = TP / D, recall = TP / N (van Rijsbergen, 1979, chapter 7).

    A detection is right if it matches an object by COCO's rule at an IoU of 0.5.
    """
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(right[order])
    if not len(scores) or not hits[-1]:
        return BestF1(0.0, None, None, 0.0, objects)
    detections = np.arange(1, len(scores) + 1)
    f1 = 2 * hits / (detections + objects)
    f1[:-1][scores[1:] == scores[:-1]] = -1  # a threshold takes all detections with its score
    best = int(f1.argmax())
    found = float(hits[best])
    return BestF1(float(f1[best]), float(scores[best]), found / (best + 1), found / objects, objects)


def duplicates(matches: DetectionMatches, threshold: float) -> dict[str, float]:
    """{pairs, detections, rate, threshold, iou}: pairs of detections of one class in one image whose IoU is 0.8 or
    more; rate = pairs / detections, of those that score `threshold` or more. Three on one spot are three pairs."""
    kept = matches.scores >= threshold
    count = 0
    for at, _ in matches.by_image():
        rows = at.start + np.flatnonzero(kept[at])
        if len(rows) > 1:
            boxes, labels = matches.boxes[rows], matches.labels[rows]
            near = bbox_iou(boxes, boxes, np.zeros(len(rows), bool)) >= DUPLICATE
            count += int(np.triu(near & (labels[:, None] == labels), 1).sum())
    found = int(kept.sum())
    return {
        "pairs": count, "detections": found, "rate": count / found if found else 0.0,
        "threshold": threshold, "iou": DUPLICATE,
    }  # fmt: skip


def calibration(matches: DetectionMatches) -> dict[str, Any]:
    """{error, bins}: how far scores are from the share of detections that are right, at an IoU of 0.5.

    The expected calibration error (Guo et al., 2017, "On Calibration of Modern Neural Networks", equation 3), with
    precision for accuracy, as a detector has it (Küppers et al., 2020, "Multivariate Confidence Calibration for Object
    Detection"): Σ over ten bins of scores of (n_b / M) · |precision_b − mean score_b|. A bin holds its lower edge, the
    last one both. bins: {from, to, score, precision, detections}; without detections, score and precision are None.
    """
    bins = calibration_curve(matches.scores, matches.right, BINS)
    error, _ = calibration_error(matches.scores, matches.right, BINS)
    return {
        "error": error,
        "bins": [
            {
                "from": each["bin_lower"],
                "to": each["bin_upper"],
                "score": each["avg_confidence"] if each["count"] else None,
                "precision": each["avg_accuracy"] if each["count"] else None,
                "detections": each["count"],
            }
            for each in bins
        ],
    }


def tide(matches: DetectionMatches, classes: int) -> dict[str, Any]:
    """{AP50, delta_AP50: {kind: gain}, counts: {kind: number}} of all scores: what each kind of error costs (Bolya et
    al., 2020, "TIDE: A General Toolbox for Identifying Object Detection Errors", sections 2.2 and 2.3).

    A detection that is not right is, where `own` and `other` are its largest IoU with objects of its class and of other
    classes, an error of the first kind that holds:

        localisation    0.1 ≤ own ≤ 0.5
        classification  other ≥ 0.5
        duplicate       it overlaps an object of its class, which another detection matches, by 0.5 or more
        background      own and other ≤ 0.1
        both            everything else: another class, and 0.1 < other < 0.5

    An object is missed if it has no match and no error of localisation or classification aims at it, which is at the
    object of the IoU above. ΔAP50 = AP50 with all errors of one kind repaired − AP50, at least 0; the gains don't add
    up. Localisation and classification: of the detections that aim at an object without a match, the one with the
    highest score becomes right, and of the object's class; all others are removed. Duplicate, background, both:
    removed. Missed: the objects are left out. AP50 is the mean over classes with objects. Crowds are left out before,
    because hotcoco takes a detection that lies in one by a tenth for misplaced; with them gone it does what the
    authors' `tidecv` does.
    """
    evaluation = counted(matches, classes)
    evaluation.evaluate()
    made = evaluation.tide_errors(IOU, BACKGROUND)
    gains = {kind: max(0.0, made["delta_ap"][name]) for kind, name in KINDS.items()}
    return {"AP50": made["ap_base"], "delta_AP50": gains, "counts": {k: made["counts"][n] for k, n in KINDS.items()}}


def describe(diagnosis: Mapping[str, Any], stats: Mapping[str, float], per_class: Mapping[str, float]) -> list[str]:
    """The figures as lines: classes in the order of per_class, their AP, then errors, calibration and duplicates."""
    rows = [(name, ap, diagnosis["F1_class"][name]) for name, ap in per_class.items()]
    rows.append(("all, at one threshold", stats["AP"], diagnosis["F1"]))
    left = max(len(name) for name, _, _ in rows)
    lines = [f"{'class':{left}}     AP  best F1  at score  precision  recall  objects"]
    for name, ap, best in rows:
        score, precision = ("–" if best[key] is None else f"{best[key]:.3f}" for key in ("threshold", "precision"))
        figures = f"{decimal(ap):>5}  {best['f1']:7.3f}  {score:>8}  {precision:>9}  {best['recall']:6.3f}"
        lines.append(f"{name:{left}}  {figures}  {best['objects']:7,}")
    costs, counts = diagnosis["tide"]["delta_AP50"], diagnosis["tide"]["counts"]
    lines.append("errors by kind (TIDE): gain of AP50 without them, number at any score")
    lines += [f"  {kind:14}  {gain:+.3f}          {counts[kind]:9,}" for kind, gain in costs.items()]
    calibration, pairs = diagnosis["calibration"], diagnosis["duplicates"]
    lines.append(f"calibration error {calibration['error']:.3f}; by score: mean score, share right, detections")
    for each in calibration["bins"]:
        if each["detections"]:
            edges, means = f"{each['from']:.1f}–{each['to']:.1f}", f"{each['score']:.3f}   {each['precision']:.3f}"
            lines.append(f"  {edges:14}   {means}  {each['detections']:9,}")
    what = f"{pairs['pairs']:,} pairs of one class with IoU ≥ {DUPLICATE:g}, {pairs['rate']:.3f} for each of"
    return [*lines, f"duplicates: {what} {pairs['detections']:,} detections with score ≥ {pairs['threshold']:g}"]
