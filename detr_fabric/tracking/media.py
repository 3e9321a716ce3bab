"""Tables and pictures as W&B takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detr_fabric.draw import Boxes, Picture


def wandb_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A table that can be sorted and plotted."""
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def wandb_image(picture: Picture, names: dict[int, str]) -> Any:
    """An image with its boxes, by side. names: of the classes, by label."""
    import wandb

    sides = {"predictions": picture.predicted, "ground_truth": picture.ground_truth}
    boxes = {
        side: {"box_data": _box_data(found, names), "class_labels": names}
        for side, found in sides.items()
        if found is not None
    }
    return wandb.Image(picture.image.permute(1, 2, 0).numpy(), caption=picture.caption, boxes=boxes)


def _box_data(found: Boxes, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Boxes in W&B's format, in pixels."""
    corners, labels = found.boxes.tolist(), found.labels.tolist()
    rows: list[dict[str, Any]] = [
        {
            "position": dict(zip(("minX", "minY", "maxX", "maxY"), box, strict=True)),
            "domain": "pixel",
            "class_id": label,
            "box_caption": names[label],
        }
        for box, label in zip(corners, labels, strict=True)
    ]
    if found.scores is not None:
        for row, score in zip(rows, found.scores.tolist(), strict=True):
            row |= {"box_caption": f"{row['box_caption']} {score:.2f}", "scores": {"score": score}}
    return rows
