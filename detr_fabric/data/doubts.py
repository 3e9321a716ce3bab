"""What looks like a mistake in annotations that are accepted: said when training starts and by the check."""

from __future__ import annotations

import numpy as np

from detr_fabric.data.formats.annotations import Annotations, leaves_image
from detr_fabric.data.summary import image_of_object

EMPTY = 1 / 3  # share of images without objects
OFTEN = 0.3  # share of boxes that leave their image
UNFIT = 0.1  # share of areas that don't fit their box
FEW = 10  # with fewer boxes, it may be chance that none reaches beyond 100 pixels


def doubts(data: Annotations) -> list[str]:
    """A sentence for each doubt."""
    image = image_of_object(data)
    objects = ~data.crowd
    boxes, sizes, areas = data.boxes[objects], data.sizes[image[objects]], data.areas[objects]
    found = []
    empty = len(data) - len(np.unique(image[objects]))
    if empty > EMPTY * len(data):
        share = empty / len(data)
        found.append(
            f"{empty:,} of {len(data):,} images ({share:.0%}) have no objects: check that their labels are there"
        )
    if not len(boxes):
        return found
    ends = boxes[:, :2] + boxes[:, 2:]
    if leaves_image(boxes, sizes).mean() > OFTEN:
        found.append("boxes leave their images so often that they may be corners instead of COCO's x, y, width, height")
    if boxes.max() <= 1:
        found.append("no box reaches beyond the first pixel: they may be fractions instead of COCO's pixels")
    elif len(boxes) >= FEW and ends.max() <= 100 and ends.max() > 50 and sizes.min() > 100:
        found.append("no box reaches beyond 100 pixels, but all images do: they may be percentages instead of pixels")
    box_areas = boxes[:, 2] * boxes[:, 3]
    unfit = (areas == 0) | (areas > 1.05 * box_areas + 1)
    if unfit.mean() > UNFIT:
        found.append(
            f"{unfit.sum():,} areas are 0 or larger than their box: AP of small, medium and large objects goes by area"
        )
    return found
