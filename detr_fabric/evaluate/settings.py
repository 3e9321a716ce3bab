"""What a command line says of an evaluation. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from detr_fabric.config import DataConfig, EvalConfig, Precision, Weights
from detr_fabric.errors import UserError

PROG = "python -m detr_fabric.evaluate"


ABOUT = """Evaluates a checkpoint. Data and evaluation settings default to those it was trained with. Other data may
have other category ids, fewer classes or more: classes are matched by name."""


@dataclass(frozen=True)
class Settings:
    """What may differ from training; everything else comes from the checkpoint."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A .ckpt file from a run's folder, one of the original DETR's files, or a folder of transformers."""
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
    """Print which classes are taken for which, of detections with this score or more; with --out also as JSON.
    Duplicates are counted among them, too (unset: 0.5)."""
    worst: int = 0
    """Draw this many images that went worst, into worst.png beside --out or the checkpoint: the lowest F1 of detections
    with the score of --confusion (unset: 0.5) or more, of equals those with more mistakes."""
    padding_check: bool = False
    """Evaluate with batch 1 too, where images have no padding, and print what the padding changes."""
    weights: Weights | None = None
    """The weights as trained, or their moving average. Unset: those that the run evaluated, which is the average where
    it was trained with --optim.ema."""
    dc5: bool = False
    """The original file is of a DC5 model, which its weights don't show."""

    def __post_init__(self) -> None:
        if self.confusion is not None and not 0 <= self.confusion <= 1:
            raise UserError(f"--confusion {self.confusion}: a score lies in [0, 1]")
        if self.worst < 0:
            raise UserError(f"--worst {self.worst}: it must be 0 or more")
        if self.padding_check and self.eval.batch_size == 1:
            raise UserError("--padding-check compares batch 1 with --eval.batch-size: set that to 2 or more")


def data_defaults(trained: DataConfig, given: DataConfig) -> DataConfig:
    """The data settings of training, without those that would hide the data that flags name.

    given: the flags' own values, unchecked.
    """
    if given.root is not None:
        own = replace(trained, root="", val_fraction=None)  # with a root, none of the paths is needed
        return replace(own, train_images=None, train_annotations=None, val_images=None, val_annotations=None)
    if given.val_images is not None or given.val_annotations is not None:
        return replace(trained, root=trained.root or "", val_fraction=None, validate_on_train=False)
    return trained
