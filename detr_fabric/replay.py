"""Runs again the step in which a loss or a gradient was not finite, and names the first bad place:

python -m detr_fabric.replay runs/x/nonfinite.pt
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from detr_fabric.cli import fail, parse, reader_may_leave
from detr_fabric.config import Config, Precision

PROG = "python -m detr_fabric.replay"
ABOUT = "Runs again the step that training saved because a loss or a gradient was not finite: what was bad first?"


@dataclass(frozen=True)
class Settings:
    """What is run again, and how."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")] = "nonfinite.pt"
    """nonfinite.pt of a run's folder."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type."""
    precision: Precision | None = None
    """Arithmetic. Unset: as in training."""


@reader_may_leave()
def main() -> None:
    settings = parse(Settings, Settings(), sys.argv[1:], PROG, ABOUT)
    try:
        replay(settings)
    except ValueError as error:
        fail(error)


def replay(settings: Settings) -> None:
    """Prints what was found then and what is found now. Raises UserError for another kind of file."""
    import torch

    from detr_fabric.checkpoint import load_model_state, read_torch_file
    from detr_fabric.data.categories import Categories
    from detr_fabric.errors import UserError
    from detr_fabric.launch import single_device
    from detr_fabric.loss.criterion import SetCriterion
    from detr_fabric.model.detr import build_model
    from detr_fabric.nonfinite import Findings, examine, micro_batches_of

    path = Path(settings.file)
    content = read_torch_file(path)
    if not isinstance(content, dict) or "micro_batches" not in content:
        raise UserError(f"{path}: not a step that was saved for replay; give the nonfinite.pt of a run's folder")
    cfg = Config.from_dict(content["config"])
    num_classes = Categories.from_dict(content["categories"]).num_classes
    fabric = single_device(settings.accelerator, settings.precision or content["precision"])
    model = build_model(cfg.model, cfg.attn, num_classes, pretrained=False)
    load_model_state(model, content["weights"], str(path))
    model.to(memory_format=torch.channels_last)
    model.to(fabric.device).train()
    criterion = SetCriterion(num_classes, **asdict(cfg.loss)).to(fabric.device)
    then = Findings(*content["findings"])
    now = examine(
        fabric,
        model,
        criterion,
        micro_batches_of(content),
        content["normalizers"].to(fabric.device),
        content["dropout_seed"],
    )

    print(f"step {content['step']}, rank {content['rank']}, images {', '.join(map(str, now.image_ids))}")
    print(f"{'':22} {'then':>14} {'now':>14}")
    for name, value in now.losses.items():
        print(f"{name:22} {then.losses[name]:14.6g} {value:14.6g}")
    print(f"first not finite then: {then.place or 'nothing, when the step was run again'}")
    print(f"first not finite now:  {now.place or 'nothing, on this machine and in this precision'}")


if __name__ == "__main__":
    main()
