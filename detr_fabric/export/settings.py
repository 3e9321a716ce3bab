"""What a command line says of an export. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from detr_fabric.config import DataConfig

PROG = "python -m detr_fabric.export"

Kind = Literal["onnx", "torch", "transformers"]

ABOUT = """Writes the model of a checkpoint as one file for ONNX Runtime or for torch.export, or as a folder for Hugging
Face's transformers. The file takes batches of images of any size, as uint8 RGB, and a mask of their padding;
normalisation is inside. It returns scores, labels and boxes. FILE.json beside it names the classes and says what goes
in and comes out.

The export is verified: on ten images, singly and in padded batches, its outputs must match the model's to 1e-4, or no
file is written. The images come from --images, else from the validation data of training, else they are built-in
scenes."""


@dataclass(frozen=True)
class Settings:
    """What is written, and which images it is tried on."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A .ckpt file from a run's folder, one of the original DETR's files, or a folder of transformers."""
    format: Kind = "onnx"
    """onnx: for ONNX Runtime; torch: a program (.pt2) for torch.export.load; transformers: a folder for Hugging Face's
    AutoModelForObjectDetection and its pipelines."""
    out: str | None = None
    """The file or folder. Unset: beside the checkpoint, as .onnx, .pt2 or _transformers."""
    images: tuple[str, ...] = ()
    """Images, folders and globs to try the file on, instead of the validation data."""
    data: DataConfig = field(default_factory=DataConfig)
    dc5: bool = False
    """The original file is of a DC5 model, which its weights don't show."""
