"""Finds objects in images with a checkpoint, which alone rebuilds model, classes and settings:

python -m detr_fabric.predict runs/x/best.ckpt photo.jpg folder/
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from detr_fabric.cli import fail, parse, reader_may_leave
from detr_fabric.config import Precision
from detr_fabric.errors import UserError

PROG = "python -m detr_fabric.predict"
ABOUT = """Finds objects in images. Writes predictions.json in COCO's result format and the images with the boxes on
them. Its image_id is the file's number where all files are called by numbers, as COCO's are (000000000139.jpg: 139);
else the file's name, for files of a folder their path in it. category_id is that of the data that the model was trained
with. bbox is x, y, width, height in pixels of the file, as stored: a photograph's orientation tag does not turn it, as
in training.

Exit code: 0 if at least one image was predicted; files that can't be read are named and left out. 2 if none was, or the
command itself is wrong."""


@dataclass(frozen=True)
class Settings:
    """What is predicted, and what is written."""

    checkpoint: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="CHECKPOINT")] = None
    """A .ckpt file from a run's folder, or an official DETR file."""
    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATH ...")] = ()
    """Images, folders (with all folders in them) and globs."""
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
    """An official file is of a DC5 model, which its weights don't show."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type."""
    precision: Precision | None = None
    """Arithmetic. Unset: bf16-mixed on a GPU that has it, else 32-true."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: a score lies in [0, 1]")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: it must be 1 or more")


@reader_may_leave()
def main() -> None:
    try:
        settings = parse(Settings, Settings(), sys.argv[1:], PROG, ABOUT)
        if settings.checkpoint is None or not settings.paths:
            raise UserError(f"name a checkpoint and images: {PROG} CHECKPOINT PATH ...; --help tells more")

        from detr_fabric.prediction import predict

        predict(settings.checkpoint, settings)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
