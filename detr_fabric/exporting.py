"""From a checkpoint's model to a file that was seen to find the same, and its description; the work of export.py."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from detr_fabric.analysis.capture import plain
from detr_fabric.batch import IMAGENET_MEAN, IMAGENET_STD, ImageBatch, normalize, pad_images
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.data.images import read_image, to_tensor
from detr_fabric.data.loader import build_foreign_validation
from detr_fabric.data.paths import find_images
from detr_fabric.data.shapes import scene
from detr_fabric.detector import Detector
from detr_fabric.errors import UserError
from detr_fabric.model.detr import DETR
from detr_fabric.portable import Run, Sides, open_onnx, open_torch, save_onnx, save_torch, sides, to_program

if TYPE_CHECKING:
    from detr_fabric.export import Settings

IMAGES = 10  # that a file is tried on
BATCH = 3  # of them in a padded batch
TOLERANCE = 1e-4  # of scores and of boxes, both in [0, 1]
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


class Difference(NamedTuple):
    """How far a file's answers are from the model's."""

    largest: float  # of scores and boxes, both in [0, 1]
    labels: int  # that are others, of classes that score alike


def export(detector: Detector, checkpoint: str, settings: Settings) -> None:
    """Writes the file and its description, if it finds what the model finds; else raises UserError."""
    out = Path(settings.out) if settings.out else Path(checkpoint).with_suffix(SUFFIXES[settings.format])
    check_writable(out)
    temporary, description = out.with_name(f"{out.name}.tmp"), out.with_name(f"{out.name}.json")
    model, limits = plain(detector.model), sides(detector.config.model)
    images, source = trial_images(detector, settings, limits)
    started = time.perf_counter()
    try:
        program = to_program(model, limits)
        (save_onnx if settings.format == "onnx" else save_torch)(program, temporary)
        seconds = time.perf_counter() - started
        found = difference(model, (open_onnx if settings.format == "onnx" else open_torch)(temporary), images)
        if not found.largest <= TOLERANCE:
            raise UserError(
                f"{out} is not written: on {source} its answers are {found.largest:.1e} off the model's, more than "
                f"{TOLERANCE:g}: use --format {'torch' if settings.format == 'onnx' else 'onnx'}, or other --images"
            )
        content = describe(detector, checkpoint, settings, limits, found)
        description.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}; give a file elsewhere") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    labels = f", {found.labels} labels between classes that score alike" if found.labels else ""
    print(
        f"{out}: {out.stat().st_size / 2**20:.1f} MiB, made in {seconds:.0f} s; {description}: classes, inputs, outputs"
    )
    print(f"largest difference of scores and boxes from the model: {found.largest:.1e}, on {source}{labels}")


def check_writable(out: Path) -> None:
    """Raises UserError at once, not after minutes."""
    try:
        if out.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}; give a file elsewhere") from error


def trial_images(detector: Detector, settings: Settings, limits: Sides) -> tuple[list[Tensor], str]:
    """IMAGES images (3, H, W) uint8 as evaluation sizes them, and what they are.

    From --images, else from the validation data; scenes take the place of those that are missing.
    """
    images: list[Tensor] = []
    if settings.images:
        source = " ".join(settings.images)
        images = fitting(detector, limits, _read(settings.images))
    elif not settings.data.builtin:
        source = "the validation data"
        data = replace(detector.config, data=settings.data).resolve().data
        try:
            dataset, _ = build_foreign_validation(data, detector.categories, 0)
            images = fitting(detector, limits, (dataset.load(index)[0] for index in range(len(dataset))))
        except UserError as error:
            if data != detector.config.data:
                raise  # the user asked for these
            print(f"the validation data of training can't be used: {error}", file=sys.stderr)
    parts = [f"{len(images)} images of {source}"] if images else []
    missing = IMAGES - len(images)
    if missing:
        images += fitting(detector, limits, _scenes(settings.data.shapes_size))[:missing]
        parts.append(f"{missing} built-in scenes")
    return images, " and ".join(parts)


def fitting(detector: Detector, limits: Sides, images: Iterator[Tensor]) -> list[Tensor]:
    """The first IMAGES that are inside the limits, resized."""
    resized = (detector.prepare(image).image for image in images)
    return list(islice((x for x in resized if min(x.shape[1:]) >= limits.smallest), IMAGES))


def _read(paths: Sequence[str]) -> Iterator[Tensor]:
    for path, _ in find_images(paths, leave_out=Path()):
        try:
            yield read_image(path)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)


def _scenes(size: int) -> Iterator[Tensor]:
    """Scenes of different shapes, so that batches of them are padded."""
    for index in range(IMAGES):
        image = to_tensor(scene("val2017", index, size)[0])
        kept = size - index * size // (2 * IMAGES)
        yield image[:, :kept] if index % 2 else image[:, :, :kept]


def difference(model: DETR, run: Run, images: Sequence[Tensor]) -> Difference:
    """The largest difference between what a file and the model find in images, one by one and in padded batches.

    A label may be another one where two classes score alike: the file's is held against the model's score for it.
    """
    batches = [pad_images([image]) for image in images]
    batches += [padded(images[first : first + BATCH]) for first in range(0, len(images), BATCH)]
    largest, other = 0.0, 0
    for batch in batches:
        scores, labels, boxes = run(batch.images.contiguous(), batch.mask)
        with torch.no_grad():
            outputs = model(*normalize(batch))
        probabilities = outputs.pred_logits[-1].softmax(-1)[..., :-1]  # (B, Q, C)
        best = probabilities.max(-1)
        if not (best.values.isfinite().all() and outputs.pred_boxes.isfinite().all()):
            raise UserError("the model's answers are not finite: its weights have diverged; use an earlier checkpoint")
        here = probabilities.gather(-1, labels[..., None])[..., 0]
        answers = (scores - best.values, scores - here, boxes - cxcywh_to_xyxy(outputs.pred_boxes[-1]))
        largest = max(largest, *(x.abs().nan_to_num(nan=torch.inf).max().item() for x in answers))
        other += int((labels != best.indices).sum())
    return Difference(largest, other)


def padded(images: Sequence[Tensor]) -> ImageBatch:
    """A batch with padding: of images of one shape the last loses its right quarter."""
    batch = pad_images(list(images))
    if not batch.mask.any():
        batch.mask[-1, :, -(batch.mask.shape[-1] // 4) :] = True
    return batch


def describe(
    detector: Detector, checkpoint: str, settings: Settings, limits: Sides, found: Difference
) -> dict[str, Any]:
    """What one has to know to use the file, for JSON."""
    categories, config = detector.categories, detector.config
    classes = [
        {"label": label, "category_id": categories.id(label), "name": categories.name(label)}
        for label in range(categories.num_classes)
    ]
    runtime = "onnxruntime" if settings.format == "onnx" else "torch"
    queries = config.model.num_queries
    return {
        "checkpoint": Path(checkpoint).name,
        "format": settings.format,
        "inputs": {
            "images": {
                "shape": ["batch", 3, "height", "width"],
                "dtype": "uint8",
                "is": "RGB pixels, 0 to 255; they are normalised inside; what padding holds does not matter",
            },
            "mask": {"shape": ["batch", "height", "width"], "dtype": "bool", "is": "true on padding"},
        },
        "outputs": {
            "scores": {"shape": ["batch", queries], "dtype": "float32", "is": "of the best class, 0 to 1"},
            "labels": {"shape": ["batch", queries], "dtype": "int64", "is": "the best class, a place in classes"},
            "boxes": {
                "shape": ["batch", queries, 4],
                "dtype": "float32",
                "is": "left, top, right, bottom in fractions of the image without its padding: multiply by the width "
                "and height of the file for its pixels",
            },
        },
        "preparation": {
            "resize": "bilinear with antialiasing; the shorter side to shorter_side, or less where the longer one "
            "would pass longest_side; sides are rounded down",
            "shorter_side": detector.scale,
            "longest_side": detector.max_size,
            "padding": "in batches of images of several shapes: right and below",
            "smallest_side": limits.smallest,
            "largest_side": limits.largest,
            "normalisation": {
                "inside": True,
                "mean": list(IMAGENET_MEAN),
                "std": list(IMAGENET_STD),
                "of": "pixels / 255",
            },
        },
        "checked": {
            "images": IMAGES,
            "largest_difference": found.largest,
            "with": f"{runtime} {version(runtime)}",
        },
        "classes": classes,
    }
