"""The cells of a study: a configuration with a seed each, its run folder, and what that holds."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from detr_fabric.config import Config
from detr_fabric.errors import UserError
from detr_fabric.presets import check_types, flags, run_file
from detr_fabric.study.settings import Study


class Cell(NamedTuple):
    """One run of a study."""

    name: str  # of the configuration
    config: Config  # with the seed and the folder
    folder: Path

    def command(self) -> list[str]:
        """The command that starts or resumes the run. Resolved, because a folder's own settings are: flags are what
        differs from these."""
        settings = flags(self.config.resolve())
        return [sys.executable, "-m", "detr_fabric.train", *(arg for flag in settings for arg in flag)]


def load_study(file: str) -> Study:
    """The `study` of a Python file. Raises UserError where there is none, or a wrong value in it."""
    study = getattr(run_file(Path(file), file), "study", None)
    if not isinstance(study, Study):
        raise UserError(f"{file}: define `study = Study(configs=..., seeds=...)` in it")
    for name, config in study.configs.items():
        check_types(config, f"{file}: {name}")
    return study


def cells(study: Study, folder: Path) -> list[Cell]:
    """All cells of a study in its folder, in the order in which they run."""
    made = []
    for seed in study.seeds:
        for name, config in study.configs.items():
            run = f"{name}-seed{seed}"
            train = replace(config.train, seed=seed, name=run, run_dir=str(folder / run))
            wandb = replace(config.wandb, group=config.wandb.group or folder.name)
            made.append(Cell(name, replace(config, train=train, wandb=wandb), folder / run))
    return made


def final_records(cell: Cell) -> list[dict[str, Any]] | None:
    """The records in log.jsonl of a run that was trained and evaluated to its end, else None.

    Raises UserError where a finished run had other settings than the study has now: its numbers are not the cell's.
    """
    train, log = cell.config.train, cell.folder / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have torn the last one
    last = next((record for record in reversed(records) if "val/AP" in record), {"step": 0, "epoch": 0})
    if (last["step"] < train.max_steps) if train.max_steps else (last["epoch"] < train.epochs):
        return None
    before = Config.from_dict(json.loads((cell.folder / "config.json").read_text())).resolve()
    now = cell.config.resolve()
    for section in fields(Config):
        was, asked = getattr(before, section.name), getattr(now, section.name)
        for field in fields(asked):
            old, new = getattr(was, field.name), getattr(asked, field.name)
            if old != new and not field.metadata.get("free", False):
                raise UserError(
                    f"{cell.folder}: was run with {section.name}.{field.name} {old}, which is {new} in the study now; "
                    "rename the configuration, or remove the folder"
                )
    return records
