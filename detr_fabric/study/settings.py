"""What a study file defines, and the flags of the command. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import tyro

from detr_fabric.config import Config
from detr_fabric.errors import UserError

PROG = "python -m detr_fabric.study"

ABOUT = """Trains every configuration of a study with every seed, and tabulates what they reached: mean and sample
standard deviation over seeds. FILE.py defines `study = Study(configs={name: Config, ...}, seeds=(42, 43))`. The same
command goes on where it was stopped and skips what is done. A cell is a configuration with a seed; its run folder is
OUT/FILE/CONFIGURATION-seedSEED. The table is printed and written to OUT/FILE/table.csv, table.md and table.tex.

Exit code: 0 done; 1 if a cell failed, which does not end the others; 75 if the study was asked to stop and can go on;
2 if the command itself is wrong."""


@dataclass(frozen=True)
class Study:
    """What a study file defines as `study`. All configurations are run with one seed before one is with the next."""

    configs: Mapping[str, Config]  # by the name that their rows and folders get
    seeds: tuple[int, ...]  # of train.seed
    numbers: str | None = None  # what the names are, where they are numbers: the axis of figure.png
    steps: tuple[int, ...] = ()  # after which all are evaluated: AP50 there, in the table and over steps in figure.png

    def __post_init__(self) -> None:
        odd = [name for name in self.configs if re.fullmatch(r"[\w.+=-]+", name) is None]
        if odd:
            raise UserError(f"a configuration is called {odd[0]!r}: letters, digits and . + = _ - only")
        if not self.configs or not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise UserError("a study has at least one configuration and one seed, and no seed twice")


@dataclass(frozen=True)
class Settings:
    """Which cells run, where, and how many at once."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE.py")]
    """The study."""
    out: str = "runs"
    """Folder of all studies."""
    jobs: int = 1
    """Cells that run at once on this machine. Each gets its part of the processor's threads."""
    cell: int | None = None
    """Run only this cell, counted from 0, as this very process: signals, output and exit code are those of
    detr_fabric.train. For SLURM: sbatch --array=0-23, and --cell $SLURM_ARRAY_TASK_ID."""
    table: bool = False
    """Run nothing: tabulate what is done."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"--jobs {self.jobs}: it must be 1 or more")
