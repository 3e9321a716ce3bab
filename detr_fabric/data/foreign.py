"""Annotations of another data set than a model was trained on: their classes go by name, whatever their ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detr_fabric.data.annotations import Annotations, read_annotations
from detr_fabric.data.categories import Categories, Id, listed, plain
from detr_fabric.data.layouts import read_content
from detr_fabric.errors import UserError


class Matched(NamedTuple):
    """Annotations under the labels of a model."""

    annotations: Annotations
    labels: frozenset[int]  # those that the file has classes for: of others there may be objects, unannotated
    notes: list[str]  # what there is to say about it, a line each


def match_by_name(path: Path, categories: Categories, images: Path | None = None) -> Matched:
    """Annotations for a model with `categories`; objects of classes that it does not know are left out.

    Names are compared as in fine-tuning, whatever their case and underscores. Raises UserError as read_annotations
    does, where the model knows no class, and where it knows several of one name.
    """
    rows = read_content(path, images).get("categories")
    if isinstance(rows, list) and all(_same(row, categories) for row in rows):
        labels_of_file = frozenset(categories.label(row["id"]) for row in rows)
        return Matched(read_annotations(path, categories, images=images), labels_of_file, [])

    own = read_annotations(path, images=images)
    named = list(zip(own.categories.ids, own.categories.names, strict=True))
    labels = [_label(id, name, categories, path) for id, name in named]
    unknown = [name for (_, name), label in zip(named, labels, strict=True) if label < 0]
    if len(unknown) == len(labels):
        known = listed(categories.names)
        raise UserError(f"{path}: the model knows none of its classes ({listed(unknown)}): give data with {known}")
    new = np.array(labels)[own.labels]
    notes = ["classes are matched by name: their ids are not those of the training data"]
    if unknown:
        objects = f"{(new < 0).sum()} of {len(new)} objects"
        notes.append(f"left out, for the model does not know them: {listed(unknown)} ({objects})")
    return Matched(_known(own, new, categories), frozenset(label for label in labels if label >= 0), notes)


def _same(row: Any, categories: Categories) -> bool:
    """Whether an entry is a class of the model, in id and name."""
    if not isinstance(row, dict) or type(row.get("id")) not in (int, str):
        return False
    position = categories.ids.index(row["id"]) if row["id"] in categories.ids else None
    return position is not None and categories.names[position] == row.get("name")


def _label(id: Id, name: str, categories: Categories, path: Path) -> int:
    """The model's label for a class: of the same name, where there are several of the same id too; -1: none."""
    for same in (str, plain):
        ids = [
            known for known, other in zip(categories.ids, categories.names, strict=True) if same(other) == same(name)
        ]
        if len(ids) == 1 or id in ids:
            return categories.label(id if id in ids else ids[0])
        if ids:
            raise UserError(
                f"{path}: the model has {len(ids)} classes named {name!r}: give the ids of its training data"
            )
    return -1


def _known(own: Annotations, labels: np.ndarray, categories: Categories) -> Annotations:
    """The annotations under new labels (M,), without the objects whose label is negative."""
    kept = labels >= 0
    per_image = np.diff(np.concatenate([[0], np.cumsum(kept)])[own.offsets])
    return replace(
        own,
        categories=categories,
        offsets=np.concatenate([[0], np.cumsum(per_image)]),
        boxes=own.boxes[kept],
        labels=labels[kept],
        crowd=own.crowd[kept],
        areas=own.areas[kept],
    )
