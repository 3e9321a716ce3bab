"""EXIF orientation tags: which view of its pixels the boxes of an image refer to.

- YOLO: the turned view, as viewers show it: ultralytics turns pixels (cv2.imread) and size (exif_size).
- Label Studio: the turned view: its boxes are percentages of what the browser shows. But beside them its COCO export
  gives the size of the pixels as stored (HumanSignal/label-studio#6608), see `turn_label_studio`.
- COCO and Pascal VOC: the pixels as stored, as torchvision reads them. But tools that show the turned view write its
  size too (CVAT: cvat-ai/cvat#4529; Label Studio's VOC export). So an image is turned if only then it has the annotated
  size; read_image decides that when it has the pixels.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from detr_fabric.data.formats.fields import fours, inside
from detr_fabric.data.formats.files import open_image
from detr_fabric.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Row = dict[str, Any]

TAG = 0x0112
PNG_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow keeps what may hold the tag
LABEL_STUDIO = "Label Studio"  # the contributor of its COCO files


class Header(NamedTuple):
    """What the header of an image file says."""

    height: int  # as stored
    width: int
    orientation: int  # see `orientation`

    @property
    def shown(self) -> tuple[int, int]:
        """(height, width) of the view that the tag asks for."""
        return (self.width, self.height) if self.orientation > 4 else (self.height, self.width)


def read_header(file: Path) -> Header | None:
    """The header of an image file; None if it can't be read."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), open_image(file) as opened:
            warnings.simplefilter("ignore")  # of odd tags and many pixels
            image = Image.open(opened)
            return Header(image.height, image.width, orientation(image))
    except UserError:
        return None
    except Exception:  # on damaged files Pillow's plugins raise nearly anything
        return None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (as stored) to 8, of an image that was opened but not yet decoded.

    It is 1 for TIFF, which Pillow turns by itself. A tag behind the pixels of a PNG is ignored: finding it would take
    decoding the pixels.
    """
    from PIL import Image

    if image.format == "TIFF" or (image.format == "PNG" and not image.info.keys() & PNG_KEYS):
        return 1
    try:
        value = Image.Image.getexif(image).get(TAG, 1)
    except Exception:  # damaged tags raise nearly anything; viewers then show the pixels as stored
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def is_label_studio(tables: dict[str, Any]) -> bool:
    info = tables.get("info")
    return isinstance(info, dict) and info.get("contributor") == LABEL_STUDIO


def turn_label_studio(images: list[Row], annotations: list[Row], folder: Path) -> int:
    """Marks the images of Label Studio's COCO export that have a tag, and gives them the size of their turned view.
    Boxes of polygons, which the export scales by the size as stored, are scaled to it. Returns how many are marked."""
    stretch: dict[Any, np.ndarray] = {}  # image id → by which the x, y, width and height of polygons grow
    for row in images:
        header = read_header(folder / row["file_name"]) if inside(row.get("file_name")) else None
        if header is None or header.orientation == 1 or row.get("turned"):
            continue
        row["turned"] = True
        height, width = header.shown
        if (row.get("height"), row.get("width")) == (header.height, header.width):
            row["height"], row["width"] = height, width
        if type(row.get("id")) in (int, str):
            stretch[row["id"]] = np.array([width / header.width, height / header.height] * 2)
    for row in annotations:
        if row.get("segmentation") and type(row.get("image_id")) in (int, str) and row["image_id"] in stretch:
            row["bbox"] = (fours([row.get("bbox")])[0] * stretch[row["image_id"]]).tolist()
    return len(stretch)
