"""Ranks on this machine without typing torchrun: --train.devices N starts torchrun's own launcher, which ends them all
when one dies. And no rank outlives its launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

from detr_fabric.launcher import launched, under_torchrun
from detr_fabric.runtime.preemption import ASKING
from detr_fabric.terminal import say

SECONDS_TO_SAVE = 30  # which an orphan gets, as torchrun gives a rank that it asks to stop


def start_ranks(devices: int | None) -> None:
    """Runs this command once for each device and ends with its exit code, or 128 plus the number of a signal.

    Returns where nothing is to be started: for a single device, and in a process that a launcher started.
    """
    if launched() is None and devices is not None and devices > 1:
        sys.exit(_launch(devices))
    if under_torchrun():
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _launch(devices: int) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # the agent's report: ranks have already said what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // devices)))
    for number in ASKING:
        signal.signal(number, _pass_on)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal was closed: training goes on
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGQUIT",  # torchrun would end the ranks 30 s after the others
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        if failure.exitcode != -signal.SIGINT:  # a second Ctrl+C needs no explanation
            name = signal.Signals(-failure.exitcode).name
            say(f"error: rank {rank} was ended by {name}", sys.stderr)
        return 128 - failure.exitcode
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """A signal to the launcher is meant for the ranks, which finish their step and save. Before they exist it ends the
    launcher."""
    ranks = list(children())
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    if not ranks:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def children(name: str | None = None) -> Iterator[int]:
    """The processes that this one started, of this name if one is given."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            before, _, after = stat.read_text().rpartition(")")
            if int(after.split()[1]) == os.getpid() and (name is None or before.endswith(f"({name}")):
                yield int(stat.parent.name)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)  # finish the step and save
    time.sleep(SECONDS_TO_SAVE)
    os._exit(1)
