"""The table of classes: the data set's category ids ↔ the model's labels ↔ names. Saved in every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from detr_fabric.draw import legible
from detr_fabric.errors import UserError

Id = int | str
LabelSpace = Literal["contiguous", "coco91"]

NAMED = 8  # a message names at most this many classes
COCO91_CLASSES = 91  # the largest category id of COCO, plus one


@dataclass(frozen=True)
class Categories:
    """The data set's category ids ↔ the model's labels ↔ names."""

    ids: tuple[Id, ...]
    names: tuple[str, ...]
    label_space: LabelSpace = "contiguous"

    @property
    def num_classes(self) -> int:
        """Width of the class head, without the no-object class."""
        return COCO91_CLASSES if self.label_space == "coco91" else len(self.ids)

    @cached_property
    def labels(self) -> dict[Id, int]:
        """Category id → label."""
        if self.label_space == "coco91":
            return {category: int(category) for category in self.ids}
        return {category: label for label, category in enumerate(self.ids)}

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {label: position for position, label in enumerate(self.labels.values())}

    def label(self, category_id: Id) -> int:
        """Label of a category id; KeyError if there is none."""
        return self.labels[category_id]

    def id(self, label: int) -> Id:
        """The data set's category id of a label; coco91's unused labels are their own id."""
        return self.ids[self._positions[label]] if label in self._positions else label

    def name(self, label: int) -> str:
        """Name of a label, with its id where several have that name; N/A for coco91's unused labels."""
        if label not in self._positions:
            return "N/A"
        name = self.names[self._positions[label]]
        return name if self.names.count(name) == 1 else f"{name} ({self.id(label)})"

    def legible_names(self) -> list[str]:
        """Names by label, as pictures show them: "class <id>" where no font of this machine can write the name."""
        labels = range(self.num_classes)
        return legible([self.name(label) for label in labels], [self.id(label) for label in labels])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, which load with weights_only=True."""
        return {"ids": list(self.ids), "names": list(self.names), "label_space": self.label_space}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Categories:
        """The inverse of to_dict."""
        return cls(tuple(state["ids"]), tuple(state["names"]), state["label_space"])


def category_id(name: str, training: Categories | None, own: Id | None = None) -> Id:
    """The id of a class in a format that has only class names: that of the training category with this name.

    own: the id without training categories; None: the name, as also for a class that the training categories lack.
    Raises UserError if several training categories have the name.
    """
    if training is None:
        return name if own is None else own
    same = [id for id, other in zip(training.ids, training.names, strict=True) if other == name]
    if own is not None and own in same:
        return own
    if len(same) > 1:
        raise UserError(f"the training data have {len(same)} categories named {name!r}: give them different names")
    return same[0] if same else name


def normalized(name: str) -> str:
    """A class name without differences in case, underscores and outer spaces."""
    return name.replace("_", " ").strip().casefold()


def by_alias(name: str, aliases: Sequence[str]) -> str:
    """The name by which a model knows a class, where `aliases` (NAME=MODEL'S) has one for it; else its own."""
    known = {normalized(own): other for own, _, other in (alias.partition("=") for alias in aliases)}
    return known.get(normalized(name), name)


def listed(names: Sequence[str]) -> str:
    """Names for a message; of many only the first."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
