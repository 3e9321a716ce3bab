"""starts.jsonl: a JSON object for each time that a run was started: where, with what, and from which step."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whoever reads the file needs no torch
    from detr_fabric.runtime.run import Run

STARTS = "starts.jsonl"


def note_start(run: Run, commit: str | None) -> None:
    """Adds this start. Raises OSError where the folder can't be written to.

    step: optimizer steps that were done before; softmax_steps: those that train with softmax before the mapping.
    """
    import torch

    from detr_fabric.model.parameters import count_parameters

    device = run.fabric.device
    start = {
        "step": run.state.step,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": run.fabric.world_size,
        "images_per_step": run.train_loader.global_batch,
        "parameters": count_parameters(run.model)["total"],
        "softmax_steps": run.softmax_steps,
    }
    with (run.folder / STARTS).open("a") as file:
        file.write(json.dumps(start) + "\n")
