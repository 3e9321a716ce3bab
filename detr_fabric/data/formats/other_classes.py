"""Annotations of another data set than the model's: classes are matched by name, whatever their ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detr_fabric.data.formats.annotations import Annotations, read_annotations
from detr_fabric.data.formats.categories import Categories, Id, by_alias, listed, normalized
from detr_fabric.data.formats.data_yaml import Split
from detr_fabric.data.formats.detect import read_content
from detr_fabric.errors import UserError


class Matched(NamedTuple):
    """Annotations with the labels of a model."""

    annotations: Annotations
    labels: frozenset[
        int
    ]  # labels that the file has a class for; objects of other classes may be there, but are not annotated
    notes: list[str]  # for the user, one line each


def match_by_name(
    path: Path,
    categories: Categories,
    images: Path | None = None,
    split: Split | None = None,
    aliases: Sequence[str] = (),
) -> Matched:
    """Annotations for a model with `categories`, without the objects of classes that it does not know.

    Names are compared as in fine-tuning, ignoring case and underscores; aliases (NAME=MODEL'S) go first. Raises
    UserError as read_annotations does, and if the model knows none of the classes, or several with the name of one.
    """
    rows = read_content(path, images, split=split).tables.get("categories")
    if isinstance(rows, list) and all(_same(row, categories) for row in rows):
        labels_of_file = frozenset(categories.label(row["id"]) for row in rows)
        return Matched(read_annotations(path, categories, images=images, split=split), labels_of_file, [])

    own = read_annotations(path, images=images, split=split)
    named = list(zip(own.categories.ids, own.categories.names, strict=True))
    labels = labels_by_name(named, categories, path, aliases)
    unknown = [name for (_, name), label in zip(named, labels, strict=True) if label < 0]
    if len(unknown) == len(labels):
        known = listed(categories.names)
        raise UserError(f"{path}: the model knows none of its classes ({listed(unknown)}): use data with {known}")
    new = np.array(labels)[own.labels]
    notes = ["classes are matched by name, because their ids differ from the training data's"]
    if unknown:
        objects = f"{(new < 0).sum()} of {len(new)} objects"
        notes.append(f"ignored (unknown to the model): {listed(unknown)} ({objects})")
    return Matched(_known(own, new, categories), frozenset(label for label in labels if label >= 0), notes)


def labels_by_name(
    named: Sequence[tuple[Id, str]], categories: Categories, path: Path, aliases: Sequence[str] = ()
) -> list[int]:
    """The model's label of each class of a file, given by id and name; -1 where it has no class of that name."""
    return [_label(id, by_alias(name, aliases), categories, path) for id, name in named]


def _same(row: Any, categories: Categories) -> bool:
    """Whether a category entry has the id and name of one of the model's classes."""
    if not isinstance(row, dict) or type(row.get("id")) not in (int, str):
        return False
    position = categories.ids.index(row["id"]) if row["id"] in categories.ids else None
    return position is not None and categories.names[position] == row.get("name")


def _label(id: Id, name: str, categories: Categories, path: Path) -> int:
    """The model's label for a class: that of the class with its name (and id, if several have the name), or -1."""
    for same in (str, normalized):
        ids = [
            known for known, other in zip(categories.ids, categories.names, strict=True) if same(other) == same(name)
        ]
        if len(ids) == 1 or id in ids:
            return categories.label(id if id in ids else ids[0])
        if ids:
            raise UserError(
                f"{path}: the model has {len(ids)} classes named {name!r}: use the category ids of its training data"
            )
    return -1


def _known(own: Annotations, labels: np.ndarray, categories: Categories) -> Annotations:
    """The annotations with new labels (M,), without the objects whose label is negative."""
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
