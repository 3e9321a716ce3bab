"""Takes validation images from annotations that have no split of their own."""

from __future__ import annotations

import hashlib

import numpy as np

from detr_fabric.data.formats.annotations import Annotations
from detr_fabric.errors import UserError


def split(annotations: Annotations, fraction: float) -> tuple[Annotations, Annotations]:
    """Splits annotations into (training, validation): about `fraction` of the images, at least one and not all, are for
    validation.

    Whether an image is among them depends on a hash of its file name, not on ids, order or other images: a data set
    that grows keeps its validation images. Raises UserError if there is only one image.
    """
    if len(set(annotations.file_names.tolist())) < 2:
        raise UserError("--data.val-fraction: there is only one image; name a folder of validation images instead")
    positions = np.array([position(name) for name in annotations.file_names.tolist()])
    fraction = min(max(fraction, positions.min()), np.unique(positions)[-2])
    held_out = positions <= fraction
    return annotations.only(np.flatnonzero(~held_out)), annotations.only(np.flatnonzero(held_out))


def position(name: str) -> float:
    """Hashes a file name to a number in [0, 1), the same on every machine."""
    digest = hashlib.blake2b(name.replace("\\", "/").encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
