"""The layouts of data sets: COCO JSON, a folder of Pascal VOC XML files, YOLO's text files; all told as COCO would."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from detr_fabric.data import voc, yolo
from detr_fabric.data.categories import Categories
from detr_fabric.errors import UserError

# Polygons are most of COCO's text and never used: cutting them out first makes reading 3 times as fast. (A polygon that
# is broken JSON in itself then goes unnoticed, as it goes unused.)
SEGMENTATION = re.compile(rb'"segmentation"\s*:\s*\[[-+0-9.eE, \t\r\n\[\]]*\]')


def root_paths(root: Path, part: Literal["train", "val"]) -> tuple[Path, Path]:
    """Images and annotations under a folder in COCO's or Pascal VOC's layout, or as YOLO's data.yaml, itself or in
    root, says."""
    if (root / voc.LISTS).is_dir():
        return root / "JPEGImages", root / voc.LISTS / f"{part}.txt"
    if (root / "data.yaml").is_file() and not (root / "annotations").exists():
        root = root / "data.yaml"
    if root.suffix in yolo.YAML:
        return yolo.images_folder(root, part), root
    return root / f"{part}2017", root / "annotations" / f"instances_{part}2017.json"


def is_folder_of_annotations(path: Path) -> bool:
    """Whether there are Pascal VOC's or YOLO's files in a folder."""
    return path.is_dir() and (any(path.glob("*.xml")) or any(path.rglob("*.txt")))


def read_content(
    path: Path, images: Path | None = None, training: Categories | None = None, polygons: bool = False
) -> dict[str, Any]:
    """The content of a COCO annotation file, or what other layouts would be as one: a folder of Pascal VOC XML files or
    a list of some (ImageSets/Main/train.txt), a folder of YOLO text files, a data.yaml.

    images: the folder of images; training: categories by whose ids VOC and YOLO call classes of the same name.
    Raises UserError, naming file and place, for what can't be read.
    """
    if path.suffix in yolo.YAML:
        return yolo.read_yolo(path, images, training)
    if path.suffix == ".txt":
        return voc.read_voc(path, training)
    if not path.is_dir():
        return read_json(path, polygons)
    if not is_folder_of_annotations(path):
        raise UserError(
            f"{path} is a folder without .xml files (Pascal VOC) and without .txt files (YOLO): name one with them, or "
            "a COCO JSON"
        )
    return voc.read_voc(path, training) if any(path.glob("*.xml")) else yolo.read_yolo(path, images, training)


def read_json(path: Path, polygons: bool = False) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where there is none, with the position of the fault."""
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: check the path of the annotations") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): check the path of the annotations") from error
    if not text.strip():
        raise UserError(f"{path} is empty: copy or download the annotations again")
    try:
        content = json.loads(text if polygons else SEGMENTATION.sub(b'"segmentation":0', text))
    except (ValueError, RecursionError):
        content = _parse_for_position(path, text)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: COCO's format has images, annotations and categories")
    return content


def _parse_for_position(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is broken JSON at {where} ({error.msg}): correct or download it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is broken JSON ({error}): correct or download it again") from error
