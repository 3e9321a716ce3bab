"""Writes a checkpoint's model for others: for ONNX Runtime, plain PyTorch or Hugging Face's transformers:

python -m detr_fabric.export runs/x/best.ckpt --format onnx
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from detr_fabric.cli import entry_point, parse
from detr_fabric.errors import UserError
from detr_fabric.evaluate.settings import data_defaults
from detr_fabric.export.settings import ABOUT, PROG, Kind, Settings

if TYPE_CHECKING:
    from detr_fabric.predict.detector import Detector

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "transformers": ("transformers",)}


@entry_point()
def main() -> None:
    detectors: list[Detector] = []

    def start(given: Settings) -> Settings:
        from detr_fabric.predict.detector import load

        detectors.append(load(given.checkpoint, "cpu", "32-true", given.dc5))
        return Settings(given.checkpoint, data=data_defaults(detectors[0].config.data, given.data))

    settings = parse(Settings, sys.argv[1:], PROG, ABOUT, start)
    check_packages(settings.format)
    from detr_fabric.export.verified import export

    export(detectors[0], settings)


def check_packages(kind: Kind) -> None:
    """Raises UserError where a format needs packages that are not installed."""
    missing = [name for name in PACKAGES.get(kind, ()) if find_spec(name) is None]
    if missing:
        raise UserError(f"--format {kind} needs more packages: pip install {' '.join(missing)}, or use --format torch")


if __name__ == "__main__":
    main()
