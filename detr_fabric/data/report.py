"""What is wrong with a data set, and what matters about it to DETR, as text for one screen."""

from __future__ import annotations

from collections import Counter

import numpy as np

from detr_fabric.data.annotations import Annotations, leaves_image
from detr_fabric.data.padding import Padding
from detr_fabric.data.repair import Finding

SMALL, LARGE = 32**2, 96**2  # COCO's limits between small, medium and large areas
FEW = 50  # a class with fewer objects is hardly learned
NAMED = 12  # classes named of those with few objects, or none

Lines = list[tuple[str, str]]  # name, text


def print_findings(findings: list[Finding], show: int) -> None:
    """What is wrong, what training does with it and what --fix does; the first `show` entries of each (0: all)."""
    if findings:
        print(f"\n  training{'':<9}found{'':<60}--fix")
    for what, training, copy, entries in findings:
        count = f"{len(entries):,}" if entries else ""
        print(f"  {training:<7}{count:>8}  {what:<64} {copy}".rstrip())
        entries = list(dict.fromkeys(entries))  # an id that comes a thousand times is named once
        shown = entries[:show] if show else entries
        rest = [f"and {len(entries) - len(shown):,} more (--show 0 names all)"] if len(shown) < len(entries) else []
        if training == "stops" and what.startswith("images"):  # with paths
            for line in map(printable, shown + rest):
                print(" " * 19 + line)
        elif entries:
            print(" " * 19 + " ".join([", ".join(shown), *rest]))


def print_statistics(data: Annotations, queries: int) -> None:
    """What DETR would learn from; queries: the most objects that an image can get."""
    print("\n  usable data")
    for name, text in [*_objects(data, queries), *_boxes(data), *_images(data), *_classes(data)]:
        print(f"  {name:<24}{text}")
    print()


def summary(data: Annotations, queries: int) -> str:
    """What training makes of the objects, in one line; queries: the most objects that an image can get."""
    counts = objects_per_image(data)
    odd = [
        (data.dropped, "boxes without area dropped"),
        (leaves_image(data.boxes, data.sizes[_image_of_object(data)]).sum(), "boxes clipped to their image"),
        (data.crowd.sum(), "crowds left out"),
        ((counts == 0).sum(), "images without objects"),
        ((counts > queries).sum(), f"images with more objects than the {queries} queries"),
        ((data.sizes == 0).any(1).sum(), "images of unknown size, to which boxes are clipped only when they are read"),
    ]
    return ", ".join([f"{counts.sum():,} objects", *(f"{number:,} {what}" for number, what in odd if number)])


def padding_summary(padding: Padding | None, otherwise: Padding | None, grouped: bool, limit: int | None) -> str:
    """How much of the training batches is padding and what lowers it, in one line.

    otherwise: if they were grouped by shape, or not where they are (`grouped`); limit: data.max_batch_pixels.
    """
    if padding is None or otherwise is None:
        return "unknown, for the annotations hardly give the sizes of images"
    text = f"about {padding.share:.0%} of the pixels of training batches"
    if limit is not None:
        text += f", of which {padding.divided:.0%} take several passes (--data.max-batch-pixels)"
    if grouped:
        return f"{text}; {otherwise.share:.0%} without --data.group-by-shape"
    if padding.share - otherwise.share < 0.02:
        return text
    return (
        f"{text}; {otherwise.share:.0%} with --data.group-by-shape, less also with a smaller --train.batch-size and "
        "more --train.accumulate"
    )


def objects_per_image(data: Annotations) -> np.ndarray:
    """(N,) number of objects, crowds left out."""
    return np.bincount(_image_of_object(data)[~data.crowd], minlength=len(data))


def printable(text: str) -> str:
    """A name or path that comes from a file, safe for a terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _image_of_object(data: Annotations) -> np.ndarray:
    """(M,) index of the image of every object."""
    return np.repeat(np.arange(len(data)), np.diff(data.offsets))


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
    image_areas = data.sizes[_image_of_object(data)[~data.crowd]].prod(1)
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
    most = ", ".join(f"{printable(name)} {count:,}" for count, name in by_count[:-4:-1])
    lines = [("classes", f"{len(by_count)}, most objects: {most}")]
    few = [f"{name} {count}" for count, name in by_count if 0 < count < FEW]
    none = [name for count, name in by_count if count == 0]
    for what, names in ((f"fewer than {FEW} objects", few), ("no objects", none)):
        if names:
            rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append((what, f"{len(names)} classes: {', '.join(map(printable, names[:NAMED]))}{rest}"))
    return lines


def _quantiles(values: np.ndarray, form: str) -> str:
    least, low, half, high, most = (f"{value:{form}}" for value in np.quantile(values, (0, 0.05, 0.5, 0.95, 1)))
    return f"median {half}, 90 % in {low} to {high}, all in {least} to {most}"
