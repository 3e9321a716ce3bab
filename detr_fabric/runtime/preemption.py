"""Signals that ask a run to stop: it finishes the step, saves and can come back. Imports no torch, to listen early."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from detr_fabric.launcher import rank

if TYPE_CHECKING:
    from lightning_fabric import Fabric

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: start the same command again
MARKER = "preempted"  # a file in the run folder, for torchrun turns every exit code into 1
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: what SLURM can send before the time limit


class Preempted(Exception):
    """Raised on all ranks alike, after the same step, when any of them was asked to stop."""


class Preemption:
    """Inside a `with` block the first of ASKING is noted, a second SIGINT ends the process at once, and SIGHUP is
    ignored. It may be entered again inside: the first block that ends ends it."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if not self._before:
            for number in ASKING:
                self._before[number] = signal.signal(number, self._note)
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # even inside a collective, where Python can't run
        if self.requested is None:
            self.requested = signal.Signals(number).name
            if rank() == 0:
                line = f"{self.requested}: finishing this step, then saving; a second SIGINT quits at once\n"
                with suppress(OSError):
                    os.write(2, line.encode())  # print may be what the signal interrupted

    def agreed(self, fabric: Fabric) -> bool:
        """Whether any rank was asked to stop; every rank must call."""
        if fabric.world_size == 1:
            return self.requested is not None
        import torch

        from detr_fabric.runtime.ranks import sum_over_ranks

        asked = torch.tensor(float(self.requested is not None), device=fabric.device)
        return bool(sum_over_ranks(asked) > 0)

    def check(self, fabric: Fabric) -> None:
        """Raises Preempted, on every rank alike, if any rank was asked to stop; every rank must call."""
        if self.agreed(fabric):
            raise Preempted


def leave_marker(folder: Path, step: int, requeue: bool, say: Callable[[str], None]) -> None:
    """Tells scripts, and SLURM where asked, that this run wants to go on."""
    try:
        (folder / MARKER).write_text(f"{step}\n")
    except OSError as error:
        say(f"{folder / MARKER}: {error.strerror}")
    if not requeue:
        return
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        say("--train.requeue: not a SLURM job, nothing is requeued")
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30)
        problem = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    say(f"scontrol requeue {job}: {problem}" if problem else f"SLURM job {job} is requeued")
