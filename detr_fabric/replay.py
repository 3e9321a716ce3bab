"""Runs again the step in which a loss or a gradient was not finite, and names the first bad place:

python -m detr_fabric.replay runs/x/nonfinite.pt
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from detr_fabric.cli import entry_point, parse
from detr_fabric.config import Precision
from detr_fabric.errors import UserError
from detr_fabric.terminal import say

PROG = "python -m detr_fabric.replay"
ABOUT = "Runs again the step that training saved because a loss or a gradient was not finite: what was bad first?"


@dataclass(frozen=True)
class Settings:
    """What is run again, and how."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """nonfinite.pt of a run's folder, or the folder."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type."""
    precision: Precision | None = None
    """Arithmetic. Unset: as in training."""


@entry_point()
def main() -> None:
    replay(parse(Settings, sys.argv[1:], PROG, ABOUT))


def replay(settings: Settings) -> None:
    """Prints what was found then and what is found now. Raises UserError for another kind of file."""
    import torch

    from detr_fabric.loss.criterion import SetCriterion
    from detr_fabric.model.attention import attend_with_softmax
    from detr_fabric.runtime.checkpoint import read_torch_file
    from detr_fabric.runtime.contents import stored_settings
    from detr_fabric.runtime.launch import single_device
    from detr_fabric.runtime.nonfinite import REPLAY_FILE, Findings, examine, micro_batches_of
    from detr_fabric.runtime.rebuild import rebuild_model

    path = Path(settings.file)
    if path.is_dir():
        path /= REPLAY_FILE
    content = read_torch_file(path)
    if not isinstance(content, dict) or "micro_batches" not in content:
        raise UserError(f"{path}: not a step that was saved for replay; give the nonfinite.pt of a run's folder")
    cfg, categories = stored_settings(content, path)
    fabric = single_device(settings.accelerator, settings.precision or content["precision"])
    model = rebuild_model(cfg, categories, content["weights"], path)
    model.to(memory_format=torch.channels_last)
    model.to(fabric.device).train()
    attend_with_softmax(model, content.get("softmax_first", False))
    criterion = SetCriterion(categories.num_classes, cfg.loss).to(fabric.device)
    then = Findings(*content["findings"])
    now = examine(
        fabric,
        model,
        criterion,
        micro_batches_of(content),
        content["normalizers"].to(fabric.device),
        content["dropout_seed"],
    )

    say(f"step {content['step']}, rank {content['rank']}, images {', '.join(map(str, now.image_ids))}")
    say(f"{'':22} {'then':>14} {'now':>14}")
    for name, value in now.losses.items():
        say(f"{name:22} {then.losses[name]:14.6g} {value:14.6g}")
    say(f"first not finite then: {then.place or 'nothing, when the step was run again'}")
    say(f"first not finite now:  {now.place or 'nothing, on this machine and in this precision'}")


if __name__ == "__main__":
    main()
