"""Annotations as the COCO dictionary that scoring compares detections with."""

from __future__ import annotations

from typing import Any

from detr_fabric.data.formats.annotations import Annotations, clip_leaving
from detr_fabric.data.summary import image_of_object


def ground_truth(annotations: Annotations) -> dict[str, Any]:
    """A COCO dictionary, crowds included, with everything renumbered: image id = index + 1, category id = label + 1,
    annotation ids from 1 (scoring never counts an annotation with id 0 as found). Boxes of which a visible
    part lies outside their image are clipped, as for training: no detection could match them otherwise."""
    image = image_of_object(annotations)
    objects = zip(
        (image + 1).tolist(),
        (annotations.labels + 1).tolist(),
        clip_leaving(annotations.boxes, annotations.sizes[image]).tolist(),
        annotations.areas.tolist(),
        annotations.crowd.astype(int).tolist(),
        strict=True,
    )
    categories = annotations.categories
    return {
        "info": {},
        "images": [
            {"id": index + 1, "height": height, "width": width}
            for index, (height, width) in enumerate(annotations.sizes.tolist())
        ],
        "categories": [
            {"id": categories.label(id) + 1, "name": name}
            for id, name in zip(categories.ids, categories.names, strict=True)
        ],
        "annotations": [
            {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
            for number, (image, label, box, area, crowd) in enumerate(objects, 1)
        ],
    }
