"""Random objects and detections on a coarse grid, where overlaps of exactly one half and ties happen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from detr_fabric.data.formats.annotations import Annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.evaluate.coco import Detections

Box = tuple[float, float, float, float]  # xyxy


class Thing(NamedTuple):
    """An object of the ground truth."""

    box: Box
    label: int
    crowd: bool = False


class Found(NamedTuple):
    """A detection."""

    box: Box
    label: int
    score: float


Scene = tuple[list[Thing], list[Found]]


def drawn(seed: int) -> tuple[int, list[Scene]]:
    """A number of classes, and scenes of them."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 4))
    return classes, random_scenes(rng, classes)


def random_scenes(rng: np.random.Generator, classes: int, images: int = 3, crowds: float = 0.2) -> list[Scene]:
    def box() -> Box:
        left, top, width, height = rng.integers(0, 4, 2).tolist() + rng.integers(1, 5, 2).tolist()
        return float(left), float(top), float(left + width), float(top + height)

    def label() -> int:
        return int(rng.integers(classes))

    return [
        (
            [Thing(box(), label(), bool(rng.random() < crowds)) for _ in range(rng.integers(0, 6))],
            [Found(box(), label(), int(rng.integers(1, 9)) / 8) for _ in range(rng.integers(0, 9))],
        )
        for _ in range(images)
    ]


def as_arrays(scenes: list[Scene], classes: int) -> tuple[Annotations, list[Detections]]:
    things = [thing for there, _ in scenes for thing in there]
    count, corners = len(scenes), np.array([thing.box for thing in things]).reshape(-1, 4)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    annotations = Annotations(
        categories=Categories(tuple(range(1, classes + 1)), tuple(f"class{k}" for k in range(classes))),
        image_ids=np.arange(count) + 10,
        file_names=np.array([f"{k}.jpg" for k in range(count)]),
        sizes=np.full((count, 2), 100),
        turned=np.zeros(count, bool),
        offsets=np.cumsum([0, *(len(there) for there, _ in scenes)]),
        boxes=boxes,
        labels=np.array([thing.label for thing in things], np.int64),
        crowd=np.array([thing.crowd for thing in things], bool),
        areas=boxes[:, 2] * boxes[:, 3],
    )
    detections = [
        Detections(
            number + 10,
            torch.tensor([each.score for each in found]),
            torch.tensor([each.label for each in found], dtype=torch.int64),
            torch.tensor([each.box for each in found]).reshape(-1, 4),
        )
        for number, (_, found) in enumerate(scenes)
    ]
    return annotations, detections


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def shared(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def overlap(a: Box, b: Box) -> float:
    """IoU."""
    return shared(a, b) / (area(a) + area(b) - shared(a, b))


def best_first(found: list[Found]) -> list[int]:
    return sorted(range(len(found)), key=lambda number: -found[number].score)


def slow_match(scene: Scene) -> dict[int, int | None]:
    """Detection → its object, or None, by COCO's rule, step by step. Ignored detections are absent."""
    there, found = scene
    free, partner = [k for k, thing in enumerate(there) if not thing.crowd], {}
    for number in best_first(found):
        box, label, _ = found[number]
        best, best_iou = None, 0.5
        for other in free:
            if there[other].label == label and overlap(box, there[other].box) >= best_iou:  # of equals the last
                best, best_iou = other, overlap(box, there[other].box)
        if best is not None:
            free.remove(best)
        elif any(t.crowd and t.label == label and shared(box, t.box) >= 0.5 * area(box) for t in there):
            continue
        partner[number] = best
    return partner
