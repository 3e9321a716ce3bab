"""What training makes of its annotations, in one line."""

from __future__ import annotations

import numpy as np

from detr_fabric.data.formats.annotations import Annotations, leaves_image


def summary(data: Annotations, queries: int) -> str:
    """What training makes of the objects; queries: the most objects that it can find in an image."""
    counts = objects_per_image(data)
    odd = [
        (data.dropped, "boxes without area dropped"),
        (leaves_image(data.boxes, data.sizes[image_of_object(data)]).sum(), "boxes clipped to their image"),
        (data.crowd.sum(), "crowds left out"),
        ((counts == 0).sum(), "images without objects"),
        (len(data) - len(np.unique(data.file_names)), "images with the file of another one"),
        ((counts > queries).sum(), f"images with more objects than the {queries} queries"),
        ((data.sizes == 0).any(1).sum(), "images of unknown size, whose boxes are clipped when they are read"),
    ]
    return ", ".join([f"{counts.sum():,} objects", *(f"{number:,} {what}" for number, what in odd if number)])


def objects_per_image(data: Annotations) -> np.ndarray:
    """(N,) number of objects without crowds."""
    return np.bincount(image_of_object(data)[~data.crowd], minlength=len(data))


def image_of_object(data: Annotations) -> np.ndarray:
    """(M,) index of the image of every object."""
    return np.repeat(np.arange(len(data)), np.diff(data.offsets))
