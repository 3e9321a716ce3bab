"""From a checkpoint's model to a file that was seen to find the same, and its description; the work of export.py."""

from __future__ import annotations

import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any

from detr_fabric.analysis.capture import unwrap
from detr_fabric.data.batch import IMAGENET_MEAN, IMAGENET_STD
from detr_fabric.errors import UserError
from detr_fabric.export.graph import Run, Sides, open_onnx, open_torch, save_onnx, save_torch, sides, to_program
from detr_fabric.export.hugging_face import FILES, how_to_load, move, open_folder, refuse, write_folder
from detr_fabric.export.trial import IMAGES, Difference, difference, trial_batches, trial_images
from detr_fabric.predict.detector import Detector
from detr_fabric.runtime.files import check_outputs
from detr_fabric.runtime.hugging_face import WEIGHTS
from detr_fabric.terminal import counted, say

if TYPE_CHECKING:
    from detr_fabric.export.settings import Kind, Settings

TOLERANCE = 1e-4  # of scores and of boxes, both in [0, 1]
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "transformers": "_transformers"}
INSTEAD = {"onnx": "torch", "torch": "onnx", "transformers": "onnx"}  # another format, where one fails


def export(detector: Detector, settings: Settings) -> None:
    """Writes the file and its description, or the folder, if it finds what the model finds; else raises UserError."""
    folder, checkpoint = settings.format == "transformers", Path(settings.checkpoint)
    out = Path(settings.out) if settings.out else checkpoint.with_name(checkpoint.stem + SUFFIXES[settings.format])
    description = out.parent / f"{out.name}.json"
    check_writable(out, folder)
    outputs = [out / name for name in FILES] if folder else [out, description]
    inputs = [checkpoint / name for name in FILES] if checkpoint.is_dir() else [checkpoint]
    check_outputs(f"--out {out}", outputs, [*inputs, *settings.images])
    if folder:
        refuse(detector)
    elif "tvmax" in detector.config.attn.mappings:
        raise UserError(
            "--attn.decoder-cross tvmax is solved in steps until it is exact, which no exported graph can hold: this "
            "model can't be exported; predict and evaluate run it"
        )
    limits = sides(detector.config.model)
    images, source = trial_images(detector, settings, limits)
    started = time.perf_counter()
    try:
        batches = trial_batches(images)
        with (
            TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as place,
            counted("steps", 1 + len(batches)) as progress,
        ):
            temporary = Path(place) / out.name
            write(detector, settings.format, temporary)
            progress(1)
            seconds = time.perf_counter() - started
            run = open_written(settings.format, temporary)
            found = difference(unwrap(detector.model), run, batches, lambda done: progress(1 + done))
            if not found.largest <= TOLERANCE:
                raise UserError(
                    f"{out} is not written: on {source} its answers are {found.largest:.1e} off the model's, more than "
                    f"{TOLERANCE:g}: use --format {INSTEAD[settings.format]}, or other --images"
                )
            if folder:
                move(temporary, out)
            else:
                content = describe(detector, settings, limits, found)
                description.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
                os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}; give a file elsewhere") from error
    if folder:
        size, inside = (out / WEIGHTS).stat().st_size, how_to_load(detector.config, out)
    else:
        size, inside = out.stat().st_size, f"{description}: classes, inputs, outputs"
    labels = f", {found.labels} labels between classes that score alike" if found.labels else ""
    say(f"{out}: {size / 2**20:.1f} MiB, made in {seconds:.0f} s; {inside}")
    say(f"largest difference of scores and boxes from the model: {found.largest:.1e}, on {source}{labels}")


def write(detector: Detector, kind: Kind, path: Path) -> None:
    if kind == "transformers":
        write_folder(detector, path)
    else:
        program = to_program(unwrap(detector.model), sides(detector.config.model))
        (save_onnx if kind == "onnx" else save_torch)(program, path)


def open_written(kind: Kind, path: Path) -> Run:
    """A file or folder as others use it."""
    return open_folder(path) if kind == "transformers" else open_onnx(path) if kind == "onnx" else open_torch(path)


def check_writable(out: Path, folder: bool) -> None:
    """Raises UserError at once, not after minutes."""
    try:
        if out.is_dir() and not folder:
            raise IsADirectoryError(None, "it is a folder")
        if out.exists() and not out.is_dir() and folder:
            raise NotADirectoryError(None, "it is a file, and this format is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out if out.is_dir() else out.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}; give a file elsewhere") from error


def describe(detector: Detector, settings: Settings, limits: Sides, found: Difference) -> dict[str, Any]:
    """What one has to know to use the file, for JSON."""
    categories, config = detector.categories, detector.config
    classes = [
        {"label": label, "category_id": categories.id(label), "name": categories.name(label)}
        for label in range(categories.num_classes)
    ]
    runtime = "onnxruntime" if settings.format == "onnx" else "torch"
    queries = config.model.num_queries
    return {
        "checkpoint": Path(settings.checkpoint).name,
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
