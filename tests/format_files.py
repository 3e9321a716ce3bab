"""Small data sets in the formats of Pascal VOC and YOLO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from detr_fabric.data.formats.annotations import Annotations
from tests.coco_files import coco, image, thing


def by_image(content: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    return [(i, [a for a in content["annotations"] if a["image_id"] == i["id"]]) for i in content["images"]]


def write_voc(folder: Path, content: dict[str, Any]) -> Path:
    """The annotations as VOC has them: whole pixels, counted from 1, the last one included."""
    folder.mkdir(parents=True)
    names = {category["id"]: category["name"] for category in content["categories"]}
    for entry, things in by_image(content):
        objects = ""
        for row in things:
            x, y, w, h = row["bbox"]
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            box = "".join(f"<{name}>{value:.0f}</{name}>" for name, value in corners.items())
            objects += f"<object><name>{escape(names[row['category_id']])}</name>"
            objects += f"<difficult>{row.get('iscrowd', 0)}</difficult><bndbox>{box}</bndbox></object>"
        size = f"<size><width>{entry['width']}</width><height>{entry['height']}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{entry['file_name']}</filename>{size}{objects}</annotation>"
        (folder / Path(entry["file_name"]).with_suffix(".xml")).write_text(text)
    return folder


def write_yolo(root: Path, content: dict[str, Any], digits: int = 17) -> Path:
    """labels/ beside images/, and data.yaml."""
    (root / "labels").mkdir(parents=True)
    numbers = {category["id"]: number for number, category in enumerate(content["categories"])}
    for entry, things in by_image(content):
        lines = []
        for row in things:
            (x, y, w, h), width, height = row["bbox"], entry["width"], entry["height"]
            parts = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(" ".join([str(numbers[row["category_id"]]), *(f"{part:.{digits}f}" for part in parts)]))
        if lines:
            (root / "labels" / Path(entry["file_name"]).with_suffix(".txt")).write_text("\n".join(lines) + "\n")
    names = [category["name"] for category in content["categories"]]
    (root / "data.yaml").write_text(f"train: images\nval: images\nnc: {len(names)}\nnames: {json.dumps(names)}\n")
    return root


def small() -> dict[str, Any]:
    """Four images, one without objects, one in a folder; two classes."""
    images = [image(1), image(2), image(3), image(4)]
    things = [thing(1, 1), thing(2, 2, category=2), thing(3, 1, box=[0, 0, 40, 30]), thing(4, 4, box=[39, 29, 1, 1])]
    return coco(images, things)


def objects(annotations: Annotations) -> dict[str, list[tuple[str, bool, list[float]]]]:
    """File name → class names, crowds and boxes, in the file's order."""
    names = [annotations.categories.name(label) for label in annotations.labels]
    rows = list(zip(names, annotations.crowd.tolist(), annotations.boxes.tolist(), strict=True))
    files = annotations.file_names.tolist()
    return {file: rows[annotations.objects(index)] for index, file in enumerate(files)}
