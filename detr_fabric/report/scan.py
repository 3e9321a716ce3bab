"""How single images went in each run: which classes are taken for which, and which images went worst."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
from lightning_fabric import Fabric

from detr_fabric.analysis.report import Subject
from detr_fabric.data.batch import MicroBatch, pad_images
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.evaluate.coco import Detections
from detr_fabric.evaluate.confusion import TABLE, confusion
from detr_fabric.evaluate.detect import detect_batch
from detr_fabric.evaluate.match import Outcome, match, outcomes

BATCH = 16
MOST = 12  # mistakes of each run that are named


class Scanned(NamedTuple):
    """One run over the images."""

    categories: list[str]  # names by label
    outcomes: dict[int, Outcome]  # of each image, by its index in the data set
    counts: np.ndarray  # (C+1, C+1) the confusion matrix


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices of `count`, evenly spread."""
    kept = min(count, most)
    return [number * count // kept for number in range(kept)]


def scan(each: Subject, fabric: Fabric, indices: Sequence[int], threshold: float) -> Scanned:
    """Runs the model over the images, of which those without a readable file are left out."""
    model, dataset = fabric.setup_module(each.model).eval(), each.dataset
    names = [dataset.categories.name(label) for label in range(dataset.categories.num_classes)]
    found: dict[int, Detections] = {}
    for numbers, batch in batches(dataset, indices):
        found |= dict(zip(numbers, detect_batch(fabric, model, batch, topk=each.cfg.eval.topk), strict=True))
    seen = sorted(found)
    matches = match(dataset.annotations.only(np.array(seen, int)), [found[index] for index in seen])
    went = dict(zip(seen, outcomes(matches, threshold), strict=True))
    return Scanned(names, went, confusion(matches, len(names), threshold))


def batches(dataset: CocoDetection, indices: Sequence[int]) -> Iterator[tuple[list[int], MicroBatch]]:
    """Consecutive images of one size, so that nothing is padded, with their indices."""
    samples = ((index, *dataset[(0, index)]) for index in indices)
    readable = (sample for sample in samples if sample[2].read_error is None)
    for _, same in groupby(readable, key=lambda sample: sample[1].shape):
        while group := list(islice(same, BATCH)):
            numbers, images, targets = (list(column) for column in zip(*group, strict=True))
            yield numbers, (pad_images(images), targets)


def worst(runs: Sequence[Scanned], count: int) -> list[int]:
    """Indices of the images with the lowest F1, mean over the runs; of equals those with more mistakes first."""
    seen = set.intersection(*({*run.outcomes} for run in runs)) if runs else set()

    def quality(index: int) -> tuple[float, int, int]:
        images = [run.outcomes[index] for run in runs]
        return float(np.mean([image.f1 for image in images])), -sum(image.mistakes for image in images), index

    return sorted(seen, key=quality)[:count]


def mistakes(runs: Sequence[Scanned]) -> list[dict[str, Any]]:
    """The most frequent mistakes of the runs side by side: {what, values, of}: "cat taken for dog", "cat missed", "cat
    where there is none", how often in each run, and of how many objects or detections of that class."""
    counted = [_mistakes(run) for run in runs]
    frequent = [sorted(each, key=lambda what: -each[what][0])[:MOST] for each in counted]
    names = dict.fromkeys(what for each in frequent for what in each)
    rows = [
        {"what": what, "values": [each.get(what, (0, 0))[0] for each in counted],
         "of": [each.get(what, (0, 0))[1] for each in counted]}
        for what in names
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -max(row["values"]))


def _mistakes(run: Scanned) -> dict[str, tuple[int, int]]:
    """What → how often, of how many."""
    names, nothing, counts = run.categories, len(run.categories), run.counts
    made = {}
    for true, found in zip(*np.nonzero(counts), strict=True):
        if true == nothing:
            what, total = f"{names[found]} where there is none", counts[:, found].sum()
        elif found != true:
            what = f"{names[true]} missed" if found == nothing else f"{names[true]} taken for {names[found]}"
            total = counts[true].sum()
        else:
            continue
        made[what] = int(counts[true, found]), int(total)
    return made


def table(run: Scanned) -> dict[str, Any] | None:
    """{names, counts}: objects of each class that occurs, by row, and what they were found as, by column; the last row
    is where there is nothing, the last column what was missed. None for more than TABLE classes."""
    nothing, counts = len(run.categories), run.counts
    seen = [label for label in range(nothing) if counts[label].any() or counts[:, label].any()]
    if not seen or len(seen) > TABLE:
        return None
    return {
        "names": [run.categories[label] for label in seen],
        "counts": counts[np.ix_([*seen, -1], [*seen, -1])].tolist(),
    }


def how_it_went(outcome: Outcome | None) -> dict[str, Any] | None:
    """The numbers under an image."""
    if outcome is None:
        return None
    return {
        "f1": round(outcome.f1, 3),
        "missed": len(outcome.missed),
        "of": outcome.objects,
        "false": outcome.false,
    }
