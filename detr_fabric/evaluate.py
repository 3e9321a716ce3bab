"""Evaluates a checkpoint, which alone rebuilds model, classes and settings:

python -m detr_fabric.evaluate runs/x/best.ckpt --data.root coco
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from detr_fabric.cli import fail, parse
from detr_fabric.config import Config, DataConfig, EvalConfig, Precision


@dataclass(frozen=True)
class Settings:
    """What may differ from training; everything else comes from the checkpoint."""

    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type."""
    devices: int | None = None
    """Processes on this machine, one device each. Unset: 1; under torchrun or SLURM: as launched."""
    precision: Precision | None = None
    """Arithmetic. Unset: bf16-mixed on a GPU that has it, else 32-true."""
    out: str | None = None
    """File for the scores, as JSON. Unset: they are only printed."""


def main() -> None:
    prog = "python -m detr_fabric.evaluate"
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=f"{prog} CHECKPOINT [OPTIONS]")
    before.add_argument("checkpoint", nargs="?")
    known, rest = before.parse_known_args(sys.argv[1:])
    about = (
        "Evaluates CHECKPOINT, the first argument. Data and evaluation settings default to those it was trained with."
    )
    if known.checkpoint is None:
        parse(Settings, Settings(), rest, prog, about)
        fail(ValueError(f"name a checkpoint: {prog} CHECKPOINT"), everywhere=True)
    try:
        from detr_fabric.checkpoint import load_checkpoint
        from detr_fabric.evaluation import evaluate_checkpoint
        from detr_fabric.launch import leave_together

        content = load_checkpoint(Path(known.checkpoint))
        config = Config.from_dict(content["config"])
        settings = parse(Settings, Settings(config.data, config.eval), rest, prog, about)
        evaluate_checkpoint(content, settings)
        leave_together()
    except ValueError as error:
        fail(error, everywhere=True)


if __name__ == "__main__":
    main()
