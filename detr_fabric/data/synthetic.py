"""Built-in data: synthetic scenes of rectangles, ellipses and triangles, written once in COCO's layout.

A scene depends only on its split, number and size; every box is exact and tight.
"""

from __future__ import annotations

import colorsys
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from detr_fabric.errors import UserError

VERSION = 1  # part of the folder's name; raise it if the scenes change
SEED = 20170
CLASSES = ("rectangle", "ellipse", "triangle")  # category ids 1, 2, 3
SPLITS = ("train2017", "val2017")
FINE = 4  # supersampling per side, for antialiased edges
MAX_OVERLAP = 0.15  # largest share of a box that another box may cover; their IoU is then below 0.1
STALE_SECONDS = 3600  # an unfinished folder older than this was left by a killed process

Box = tuple[int, int, int, int]  # left, top, right, bottom in fine pixels


def prepare(size: int, train: int, val: int, folder: str | None = None) -> Path:
    """Writes the scenes unless they exist already. Returns their folder, with train2017/, val2017/ and annotations/.

    size: side of a scene in pixels; train, val: number of scenes; folder: parent of the returned folder (None: below
    $XDG_CACHE_HOME or ~/.cache). Raises UserError if it cannot be written.
    """
    final = _folder_of(size, train, val, folder)
    parent = final.parent
    if final.is_dir():
        return final
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(parent, final.name)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=parent))
        try:
            for split, count in zip(SPLITS, (train, val), strict=True):
                _write_split(unfinished, split, size, count)
            unfinished.chmod(0o755)
            _rename(unfinished, final)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise UserError(f"the built-in scenes cannot be written ({error}): set --data.shapes-dir") from error
    return final


def exist(size: int, train: int, val: int, folder: str | None) -> bool:
    """Whether the scenes lie there already, completely: their folder was renamed into place."""
    return _folder_of(size, train, val, folder).is_dir()


def _folder_of(size: int, train: int, val: int, folder: str | None) -> Path:
    parent = Path(folder) if folder is not None else _cache_folder()
    return parent / f"{size}-{train}-{val}-v{VERSION}"


def _cache_folder() -> Path:
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a container's user without a home
        raise UserError("there is no home folder for the built-in scenes: set --data.shapes-dir") from error
    return Path(cache) / "detr_fabric" / "shapes"


def scene(split: str, index: int, size: int) -> tuple[Image.Image, list[int], list[list[float]]]:
    """Scene `index`: RGB image, category ids, and x, y, width, height boxes in pixels."""
    rng = np.random.default_rng([SEED, SPLITS.index(split), index])
    image = _background(rng, size)
    boxes = _place(rng, size * FINE)
    hue = rng.random()
    kinds = []
    for number, box in enumerate(boxes):
        kind = int(rng.integers(len(CLASSES)))
        kinds.append(kind + 1)
        # Hues spread evenly over the colour circle make the objects of a scene easy to tell apart.
        shade = ((hue + number / len(boxes) + rng.uniform(-0.06, 0.06)) % 1, rng.uniform(0.7, 1), rng.uniform(0.75, 1))
        colour = tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(*shade))
        image.paste(colour, mask=_mask(rng, CLASSES[kind], box, size))
    pixels = [
        [left / FINE, top / FINE, (right - left) / FINE, (bottom - top) / FINE] for left, top, right, bottom in boxes
    ]
    return image, kinds, pixels


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """A slight gradient between two muted colours, with a little noise."""
    grey = rng.uniform(70, 200)
    first, drift = grey + rng.uniform(-18, 18, 3), rng.uniform(-22, 22, 3)
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, size)
    slope = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]  # (size, size)
    pixels = first + slope[:, :, None] * drift + rng.normal(0, 2.5, (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _place(rng: np.random.Generator, side: int) -> list[Box]:
    """1 to 4 boxes that hardly overlap, with sides of 0.2 to 0.5 of the image; a box without room is left out."""
    boxes: list[Box] = []
    for _ in range(int(rng.integers(1, 5))):
        for _ in range(20):
            width, height = (int(value) for value in rng.integers(side // 5, side // 2 + 1, 2))
            left, top = int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1))
            box = (left, top, left + width, top + height)
            if all(_covered(box, other) < MAX_OVERLAP for other in boxes):
                boxes.append(box)
                break
    return boxes


def _covered(a: Box, b: Box) -> float:
    """Intersection over the area of the smaller box."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))


def _mask(rng: np.random.Generator, kind: str, box: Box, size: int) -> Image.Image:
    """How much of each pixel the object covers, 0 to 255; it touches all four sides of its box."""
    fine = Image.new("L", (size * FINE, size * FINE))
    draw = ImageDraw.Draw(fine)
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1  # Pillow's last pixel is inside
    if kind == "rectangle":
        draw.rectangle((left, top, right, bottom), fill=255)
    elif kind == "ellipse":
        draw.ellipse((left, top, right, bottom), fill=255)
    else:
        tip = int(rng.integers(left + (right - left) // 4, right - (right - left) // 4 + 1))
        draw.polygon(((left, bottom), (right, bottom), (tip, top)), fill=255)
    return fine.reduce(FINE)


def _write_split(root: Path, split: str, size: int, count: int) -> None:
    folder = root / split
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        image, kinds, boxes = scene(split, index, size)
        name = f"{index + 1:012d}.jpg"
        image.save(folder / name, quality=95, subsampling=0)
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        for kind, box in zip(kinds, boxes, strict=True):
            row = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": kind, "bbox": box}
            annotations.append(row | {"area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    (root / "annotations").mkdir(exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _rename(unfinished: Path, final: Path) -> None:
    try:
        unfinished.rename(final)
    except OSError:
        if not final.is_dir():  # otherwise another process was faster and wrote the same scenes
            raise


def _remove_stale(parent: Path, name: str) -> None:
    for abandoned in parent.glob(f".{name}.*"):
        if time.time() - abandoned.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(abandoned, ignore_errors=True)
