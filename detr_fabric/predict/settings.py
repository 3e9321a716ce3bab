"""What a command line says of a prediction. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from detr_fabric.config import Precision
from detr_fabric.errors import UserError

PROG = "python -m detr_fabric.predict"


ABOUT = """Finds objects in images. Writes predictions.json in COCO's result format and the images with the boxes on
them. image_id is the file's number where all files are called by numbers, as COCO's are (000000000139.jpg: 139); else
images are counted from 1, and file_name says which is which. category_id is that of the data that the model was trained
with, or counted from 1 where that has only names. With --annotations both come from that file, so that its objects can
be compared with the detections. bbox is x, y, width, height in pixels of the image as viewers show it: turned by its
EXIF orientation tag, if it has one.

Exit code: 0 if at least one image was predicted; files that can't be read are named and left out. 2 if none was, or the
command itself is wrong."""


@dataclass(frozen=True)
class Settings:
    """What is predicted, and what is written."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A .ckpt file from a run's folder, one of the original DETR's files, or a folder of transformers."""
    paths: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATH ...", help_behavior_hint="(required)")
    ]
    """Images, folders (with all folders in them) and globs."""
    annotations: Annotated[str | None, tyro.conf.arg(metavar="FILE.json")] = None
    """COCO JSON whose ids the detections get: of images by file name, of classes by name. Files that it lacks are left
    out. For scoring, keep all detections (--threshold 0)."""
    threshold: float = 0.7
    """Smallest score of a detection; 0 keeps all, as scoring wants it."""
    out: str = "predictions"
    """Folder for predictions.json, pictures/ and attention/."""
    pictures: bool = True
    """Draw the detections on the images."""
    attention: bool = False
    """Draw for each detection which parts of the image its query read: its decoder cross-attention."""
    batch_size: int = 1
    """Images per forward pass, of like shapes; 1, without padding, gives what evaluation gives."""
    dc5: bool = False
    """The original file is of a DC5 model, which its weights don't show."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type."""
    precision: Precision | None = None
    """Arithmetic. Unset: bf16-mixed on a GPU that has it, else 32-true."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: a score lies in [0, 1]")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: it must be 1 or more")
