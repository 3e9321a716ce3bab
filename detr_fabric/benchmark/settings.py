"""What a command line says of a benchmark. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from detr_fabric.errors import UserError

Part = Literal["loss", "data", "eval", "inference", "step", "train", "attention", "start", "memory"]

PROG = "python -m detr_fabric.benchmark"
ABOUT = """Measures this machine: training's and evaluation's parts, ours beside a baseline in the same run. `ratio` is
a row's time over ours, round by round: 2 means that ours is twice as fast. Of attention, where much is ours, it is the
time over explicit softmax."""


@dataclass(frozen=True)
class DataSettings:
    """Images."""

    root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """COCO folder whose training images `data` reads instead of images of its own."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    parts: Annotated[tyro.conf.Positional[tuple[Part, ...]], tyro.conf.arg(metavar="[PART ...]")] = ()
    """What to measure: loss, data, eval, inference, step, train, attention, start, memory. None given: all of them."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the figures there, with machine, versions and commit."""
    quick: bool = False
    """Small sizes and few rounds: does it run, not how fast."""
    data: DataSettings = field(default_factory=DataSettings)
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type."""
    threads: int = 1
    """torch threads on the CPU; one is least noisy."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UserError(f"--threads {self.threads}: it must be 1 or more")


GPU_PROG = "python -m detr_fabric.benchmark.gpu"
GPU_ABOUT = """Runs everything that only a GPU can show and prints one table, within 20 minutes: the tests marked gpu,
training steps beside transformers', peak memory beside the simulated, waits, sparse attention with and without its
kernels, images a second from JPEG files on, and quickstart."""


@dataclass(frozen=True)
class GpuSettings:
    """Which device, and how thoroughly."""

    accelerator: Literal["cuda", "cpu"] = "cuda"
    """Device type; cpu only shows that everything here runs."""
    quick: bool = False
    """Small sizes and few rounds: does it run, not how fast."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the table there, with machine, versions and commit."""
