"""What training says of EXIF orientation tags where the annotations' format does not settle which view is meant."""

from __future__ import annotations

import numpy as np

from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.orientation import read_header

LOOKED_AT = 256  # opening every file of a large data set would take minutes on a network's file system


def orientation_tags(dataset: CocoDetection) -> list[str]:
    """A sentence for each of: images whose tag is ignored, and images that are turned by it because only then they have
    their annotated size. Of large data sets LOOKED_AT images, evenly spread, are looked at."""
    data = dataset.annotations
    looked_at = np.unique(np.linspace(0, len(data) - 1, min(len(data), LOOKED_AT)).round().astype(int))
    ignored = turned = 0
    for row in looked_at.tolist():
        header = None if data.turned[row] else read_header(dataset.folder / str(data.file_names[row]))
        if header is None or header.orientation == 1:
            continue
        by_size = header.shown != header[:2] and tuple(data.sizes[row].tolist()) == header.shown
        ignored, turned = ignored + (not by_size), turned + by_size
    of = f"{len(looked_at):,} images" + (" that were looked at" if len(looked_at) < len(data) else "")
    found = []
    if ignored:
        found.append(
            f"warning: {ignored} of {of} have an EXIF orientation tag, which is ignored, as by COCO's tools: if their "
            "boxes are of the turned view, turn the pixels of the files"
        )
    if turned:
        found.append(f"{turned} of {of} are turned by their EXIF orientation tag, to have their annotated size")
    return found
