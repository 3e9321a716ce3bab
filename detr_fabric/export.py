"""Writes a checkpoint's model as a file that runs without this package, in ONNX Runtime or in plain PyTorch:

python -m detr_fabric.export runs/x/best.ckpt --format onnx
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from detr_fabric.cli import fail, parse, reader_may_leave
from detr_fabric.config import DataConfig
from detr_fabric.errors import UserError
from detr_fabric.evaluate import data_defaults

PROG = "python -m detr_fabric.export"
ABOUT = """Writes the model of CHECKPOINT, the first argument, as one file for ONNX Runtime or for torch.export. That
file takes batches of images of any size, as uint8 RGB, and a mask of their padding; normalisation is inside. It gives
scores, labels and boxes. FILE.json beside it names the classes and says what goes in and comes out.

The file gets its name only if it finds in ten images, one by one and in padded batches, what the model finds, to 1e-4.
These come from --images, else from the validation data of training, else they are built-in scenes."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Settings:
    """What is written, and which images it is tried on."""

    format: Literal["onnx", "torch"] = "onnx"
    """onnx: for ONNX Runtime; torch: a program (.pt2) for torch.export.load."""
    out: str | None = None
    """The file. Unset: beside the checkpoint, as .onnx or .pt2."""
    images: tuple[str, ...] = ()
    """Images, folders and globs to try the file on."""
    data: DataConfig = field(default_factory=DataConfig)
    dc5: bool = False
    """An official file is of a DC5 model, which its weights don't show."""


@reader_may_leave()
def main() -> None:
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=f"{PROG} CHECKPOINT [OPTIONS]")
    before.add_argument("checkpoint", nargs="?")
    before.add_argument("--dc5", action="store_true")
    known, rest = before.parse_known_args(sys.argv[1:])
    try:
        if known.checkpoint is None or {"-h", "--help"} & set(rest):
            parse(Settings, Settings(), rest, PROG, ABOUT)
            raise UserError(f"name a checkpoint: {PROG} CHECKPOINT")

        from detr_fabric.detector import load

        detector = load(known.checkpoint, "cpu", "32-true", known.dc5)
        data = data_defaults(detector.config.data, rest)
        settings = parse(Settings, Settings(data=data, dc5=known.dc5), rest, PROG, ABOUT)
        check_packages(settings.format)

        from detr_fabric.exporting import export

        export(detector, known.checkpoint, settings)
    except ValueError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


def check_packages(kind: Literal["onnx", "torch"]) -> None:
    """Raises UserError where a format needs packages that are not installed."""
    missing = [name for name in PACKAGES if kind == "onnx" and find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs more packages: pip install {' '.join(missing)}, or use --format torch")


if __name__ == "__main__":
    main()
