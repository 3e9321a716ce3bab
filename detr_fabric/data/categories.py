"""The table of classes: the data set's category ids ↔ the model's labels ↔ names. Saved in every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Id = int | str
LabelSpace = Literal["contiguous", "coco91"]

NAMED = 8  # classes that a line names, at most
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
        """Name of a label; N/A for coco91's unused labels."""
        return self.names[self._positions[label]] if label in self._positions else "N/A"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, which load with weights_only=True."""
        return {"ids": list(self.ids), "names": list(self.names), "label_space": self.label_space}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Categories:
        """The inverse of to_dict."""
        return cls(tuple(state["ids"]), tuple(state["names"]), state["label_space"])


def category_id(name: str, training: Categories | None, own: Id | None = None) -> Id:
    """The id of a class in formats that know classes by their names: in the training categories, or its own.

    own: None means the name itself, which is also the id of classes that the training categories lack.
    """
    if training is None:
        return name if own is None else own
    same = [id for id, other in zip(training.ids, training.names, strict=True) if other == name]
    return own if own in same and own is not None else (same or [name])[0]


def plain(name: str) -> str:
    """What two names of one class have in common."""
    return name.replace("_", " ").strip().casefold()


def listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
