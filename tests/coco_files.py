"""Small COCO data sets on disk for the data tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def coco(
    images: list[dict[str, Any]] | None = None,
    annotations: list[dict[str, Any]] | None = None,
    categories: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Two images of 40 x 30 pixels, two categories, three objects; any table can be replaced."""
    return {
        "images": [image(1), image(2)] if images is None else images,
        "annotations": [thing(1, 1), thing(2, 2, category=2), thing(3, 1)] if annotations is None else annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}] if categories is None else categories,
    }


def image(id: Any, **changes: Any) -> dict[str, Any]:
    return {"id": id, "file_name": f"{id}.png", "width": 40, "height": 30} | changes


def thing(id: Any, image: Any, box: Any = (10, 5, 20, 10), category: Any = 1, **changes: Any) -> dict[str, Any]:
    """An annotation without area and iscrowd."""
    return {"id": id, "image_id": image, "category_id": category, "bbox": box} | changes


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_images(folder: Path, content: dict[str, Any]) -> Path:
    """A PNG of noise for every image of `content`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for entry in content["images"]:
        pixels = rng.integers(0, 256, (entry.get("height", 30), entry.get("width", 40), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / entry["file_name"])
    return folder


def write_root(root: Path, train: dict[str, Any], val: dict[str, Any]) -> Path:
    """Both splits in COCO's layout."""
    for split, content in (("train", train), ("val", val)):
        write_images(root / f"{split}2017", content)
        write_json(root / "annotations" / f"instances_{split}2017.json", content)
    return root


def _bomb(path: Path) -> None:
    """A JPEG whose header promises 65535 x 65535 pixels."""
    Image.new("RGB", (40, 30)).save(path, "JPEG")
    data = bytearray(path.read_bytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {  # what can be wrong with an image file of 40 x 30 pixels
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-300]),
    "web page": lambda path: path.write_text("<html><body>404 not found</body></html>"),
    "other size": lambda path: Image.new("RGB", (30, 40)).save(path),
    "bomb": _bomb,
}
