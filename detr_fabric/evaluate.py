"""Evaluates a checkpoint, which alone rebuilds model, classes and settings:

python -m detr_fabric.evaluate runs/x/best.ckpt --data.root coco --confusion 0.5 --worst 16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from detr_fabric.cli import fail, parse, reader_may_leave
from detr_fabric.config import Config, DataConfig, EvalConfig, Precision
from detr_fabric.errors import UserError

ABOUT = """Evaluates CHECKPOINT, the first argument. Data and evaluation settings default to those it was trained with.
Other data may have other category ids, fewer classes or more: classes go by their names."""


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
    confusion: float | None = None
    """Print which classes are taken for which, of detections with this score or more; with --out also as JSON."""
    worst: int = 0
    """Draw this many images that went worst, into worst.png beside --out or the checkpoint: the lowest F1 of detections
    with the score of --confusion (unset: 0.5) or more, of equals those with more mistakes."""
    padding_check: bool = False
    """Evaluate with batch 1 too, where images have no padding, and print what the padding changes."""

    def __post_init__(self) -> None:
        if self.confusion is not None and not 0 <= self.confusion <= 1:
            raise UserError(f"--confusion {self.confusion}: a score lies in [0, 1]")
        if self.worst < 0:
            raise UserError(f"--worst {self.worst}: it must be 0 or more")
        if self.padding_check and self.eval.batch_size == 1:
            raise UserError("--padding-check compares batch 1 with --eval.batch-size: set that to 2 or more")


@reader_may_leave()
def main() -> None:
    prog = "python -m detr_fabric.evaluate"
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=f"{prog} CHECKPOINT [OPTIONS]")
    before.add_argument("checkpoint", nargs="?")
    known, rest = before.parse_known_args(sys.argv[1:])
    if known.checkpoint is None or {"-h", "--help"} & set(rest):
        parse(Settings, Settings(), rest, prog, ABOUT)
        fail(ValueError(f"name a checkpoint: {prog} CHECKPOINT"), everywhere=True)
    try:
        from detr_fabric.checkpoint import load_checkpoint
        from detr_fabric.launch import leave_together
        from detr_fabric.scorecard import evaluate_checkpoint

        content = load_checkpoint(Path(known.checkpoint))
        config = Config.from_dict(content["config"])
        settings = parse(Settings, Settings(data_defaults(config.data, rest), config.eval), rest, prog, ABOUT)
        evaluate_checkpoint(content, Path(known.checkpoint), settings)
        leave_together()
    except ValueError as error:
        fail(error, everywhere=True)


def data_defaults(trained: DataConfig, args: Sequence[str]) -> DataConfig:
    """The data settings of training, without those that would hide the data that `args` name."""
    given = {arg.partition("=")[0] for arg in args}
    if "--data.root" in given:
        own = replace(trained, root="", val_fraction=None)  # with a root, none of the paths is needed
        return replace(own, train_images=None, train_annotations=None, val_images=None, val_annotations=None)
    if given & {"--data.val-images", "--data.val-annotations"}:
        return replace(trained, root=trained.root or "", val_fraction=None, validate_on_train=False)
    return trained


if __name__ == "__main__":
    main()
