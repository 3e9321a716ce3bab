"""Prints what is wrong with a data set and the statistics that matter to DETR, on one screen."""

from __future__ import annotations

from collections import Counter

import numpy as np

from detr_fabric.check.repair import Finding
from detr_fabric.data.formats.annotations import Annotations
from detr_fabric.data.summary import image_of_object, objects_per_image
from detr_fabric.terminal import noun, say

SMALL, LARGE = 32**2, 96**2  # COCO's limits between small, medium and large areas
FEW = 50  # a class with fewer objects is hardly learned
NAMED = 12  # how many of the classes with few objects, or none, are named

Lines = list[tuple[str, str]]  # name, text


def print_findings(findings: list[Finding], show: int) -> None:
    """Prints each finding, what training and --fix do about it, and its first `show` entries (0: all)."""
    if findings:
        say()
        say(f"  training{'':<9}found{'':<60}--fix")
    for what, training, copy, entries in findings:
        count = f"{len(entries):,}" if entries else ""
        say(f"  {training:<7}{count:>8}  {what:<64} {copy}".rstrip())
        entries = list(dict.fromkeys(entries))  # an id that occurs a thousand times is named once
        shown = entries[:show] if show else entries
        rest = [f"and {len(entries) - len(shown):,} more (--show 0 names all)"] if len(shown) < len(entries) else []
        if training == "stops" and what.startswith("images"):  # with paths
            for line in shown + rest:
                say(" " * 19 + line)
        elif entries:
            say(" " * 19 + " ".join([", ".join(shown), *rest]))


def print_statistics(data: Annotations, queries: int) -> None:
    """Prints what DETR would learn from. queries: the most detections that an image can get."""
    say()
    say("  usable data")
    for name, text in [*_objects(data, queries), *_boxes(data), *_images(data), *_classes(data)]:
        say(f"  {name:<24}{text}")
    say()


def _objects(data: Annotations, queries: int) -> Lines:
    counts = objects_per_image(data)
    crowds = int(data.crowd.sum())
    return [
        ("images", f"{len(data):,}, {(counts == 0).sum():,} of them without objects"),
        ("objects", f"{counts.sum():,}" + (f", and {crowds:,} crowds, which are not trained on" if crowds else "")),
        ("objects per image", _quantiles(counts, ",.0f")),
        (f"above {queries} queries", f"{(counts > queries).sum():,} images"),
    ]


def _boxes(data: Annotations) -> Lines:
    areas, boxes = data.areas[~data.crowd], data.boxes[~data.crowd]
    if not len(areas):
        return []
    small, large = (areas < SMALL).mean(), (areas >= LARGE).mean()
    lines = [("areas by COCO's limits", f"small {small:.1%}, medium {1 - small - large:.1%}, large {large:.1%}")]
    image_areas = data.sizes[image_of_object(data)[~data.crowd]].prod(1)
    known = image_areas > 0
    if known.any():
        parts = np.sqrt((boxes[known, 2:].prod(1) / image_areas[known]).clip(0, 1))
        lines.append(("box side / image side", _quantiles(parts, ".3f")))
    return lines


def _images(data: Annotations) -> Lines:
    sizes = data.sizes[(data.sizes > 0).all(1)]
    if not len(sizes):
        return [("image sizes", "unknown")]
    (height, width), times = Counter(map(tuple, sizes.tolist())).most_common(1)[0]
    return [
        ("image width", _quantiles(sizes[:, 1], ".0f")),
        ("image height", _quantiles(sizes[:, 0], ".0f")),
        ("width / height", _quantiles(sizes[:, 1] / sizes[:, 0], ".2f")),
        ("most frequent size", f"{width} x {height}, {times / len(data):.0%} of the images"),
    ]


def _classes(data: Annotations) -> Lines:
    table = data.categories
    counts = np.bincount(data.labels[~data.crowd], minlength=table.num_classes).tolist()
    by_count = sorted((counts[label], name) for name, label in zip(table.names, table.labels.values(), strict=True))
    most = ", ".join(f"{name} {count:,}" for count, name in by_count[:-4:-1] if count)
    lines = [("classes", f"{len(by_count)}" + (f", most objects: {most}" if most else ""))]
    few = [f"{name} {count}" for count, name in by_count if 0 < count < FEW]
    none = [name for count, name in by_count if count == 0]
    for what, names in ((f"fewer than {FEW} objects", few), ("no objects", none)):
        if names:
            rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append((what, f"{len(names)} {noun('class', len(names))}: {', '.join(names[:NAMED])}{rest}"))
    return lines


def _quantiles(values: np.ndarray, form: str) -> str:
    least, low, half, high, most = (f"{value:{form}}" for value in np.quantile(values, (0, 0.05, 0.5, 0.95, 1)))
    return f"median {half}, 90 % in {low} to {high}, all in {least} to {most}"
