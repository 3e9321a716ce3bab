"""Writes the repaired copy of a data set."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.formats.categories import Categories, LabelSpace
from detr_fabric.errors import UserError


def write_copy(out: Path, tables: dict[str, Any], training: Categories | None, label_space: LabelSpace) -> None:
    """Writes the copy under a temporary name, reads it as training does, and only then gives it its name."""
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with unfinished.open("w") as file:
            file.write(json.dumps(tables))
            file.flush()
            os.fsync(file.fileno())
        read_annotations(unfinished, training, label_space)
        unfinished.replace(out)
    except OSError as error:
        raise UserError(f"--fix {out} cannot be written ({error.strerror}): name another file") from error
    finally:
        unfinished.unlink(missing_ok=True)


def renumber(tables: dict[str, Any], training: Categories | None) -> dict[str, Any]:
    """Tables of Pascal VOC or YOLO data as COCO tools want them: ids that are numbers, with area and iscrowd.

    Categories that have names as ids are counted from 1, in the order of the training categories.
    """
    images = {row["id"]: number for number, row in enumerate(tables["images"], 1)}
    ids = [row["id"] for row in tables["categories"]] if training is None else training.ids
    categories = {id: id if isinstance(id, int) else number for number, id in enumerate(ids, 1)}
    annotations = [
        row
        | {"id": number, "image_id": images[row["image_id"]], "category_id": categories[row["category_id"]]}
        | {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": row.get("iscrowd", 0)}
        for number, row in enumerate(tables["annotations"], 1)
    ]
    return {
        "images": [row | {"id": images[row["id"]]} for row in tables["images"]],
        "annotations": annotations,
        "categories": [row | {"id": categories[row["id"]]} for row in tables["categories"]],
    }
