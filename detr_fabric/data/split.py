"""Validation images taken from an annotation file that has no split of its own."""

from __future__ import annotations

import hashlib

import numpy as np

from detr_fabric.data.annotations import Annotations
from detr_fabric.errors import UserError


def split(annotations: Annotations, fraction: float) -> tuple[Annotations, Annotations]:
    """(training, validation): about `fraction` of the images are for validation, at least one, and not all.

    A hash of its file name decides about an image: not the order, not the ids, and not which other images there are, so
    that a data set that grows keeps its validation images.
    """
    if len(set(annotations.file_names.tolist())) < 2:
        raise UserError("--data.val-fraction: there is only one image; give validation images of their own")
    places = np.array([place(name) for name in annotations.file_names.tolist()])
    fraction = min(max(fraction, places.min()), np.unique(places)[-2])
    held_out = places <= fraction
    return annotations.only(np.flatnonzero(~held_out)), annotations.only(np.flatnonzero(held_out))


def place(name: str) -> float:
    """A number in [0, 1) that is drawn from a file name; the same on every machine."""
    digest = hashlib.blake2b(name.replace("\\", "/").encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
