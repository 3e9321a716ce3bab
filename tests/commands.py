"""Runs of the command line as real processes, the way a user starts them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fabric.train import main

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 16  # of debug_job() on one rank
OFTEN = ("--train.checkpoint-minutes", "0")  # a checkpoint after every step


def environment(**changes: str) -> dict[str, str]:
    """One thread a process, the package importable from anywhere, and no W&B key."""
    hidden = ("WANDB_API_KEY", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    inherited = {key: value for key, value in os.environ.items() if key not in hidden}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **changes}


def python(*args: str, cwd: Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """python args…, in the folder cwd; stdout and stderr as text."""
    command = [sys.executable, *args]
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def exit_code(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *args: object) -> int:
    """That of a command which is run in this process."""
    monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, args)])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def train(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "detr_fabric.train", *args, cwd=cwd, **env)


def torchrun(processes: int, *args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return python(*launcher, "-m", "detr_fabric.train", *args, cwd=cwd, **env)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl."""
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def free_port() -> int:
    """One that no other process is given before it is used: the system chooses from 32768 on."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", 25_000 + secrets.randbelow(7_000)))
            return int(free.getsockname()[1])


class Job:
    """Training in one process or several, forked from a server that has torch loaded: a start takes a second, not ten.

    Several ranks meet as torchrun makes them meet. All that they print goes to one file.
    """

    def __init__(self, *args: str, cwd: Path, ranks: int = 1, target: Callable[..., None] | None = None, **env: str):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["detr_fabric.build", "detr_fabric.loop", "detr_fabric.train", "torch.distributed"]
        )
        handle, name = tempfile.mkstemp(dir=cwd, prefix="output-")
        os.close(handle)
        self.file = Path(name)
        self.processes = []
        port = free_port()
        for rank in range(ranks):
            changes = environment(**env)
            if ranks > 1:
                changes |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
                changes |= {key: str(rank) for key in ("RANK", "LOCAL_RANK")} | {"GROUP_RANK": "0"}
                changes |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            process = context.Process(target=_train, args=(args, str(cwd), name, changes, target))
            process.start()
            self.processes.append(process)

    def text(self) -> str:
        return self.file.read_text()

    def wait(self, timeout: float = 240) -> list[int]:
        """The exit codes, negative for a signal; whatever runs at the timeout is killed and fails the test."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process.pid for process in self.processes if process.exitcode is None]
        self.signal(signal.SIGKILL)
        assert not late, f"{late} did not end:\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].exitcode is None:
                os.kill(self.processes[rank].pid, number)

    def wait_until(self, happened: Callable[[], object], timeout: float = 200) -> None:
        end = time.monotonic() + timeout
        while not happened():
            alive = any(process.exitcode is None for process in self.processes)
            assert alive and time.monotonic() < end, f"it did not happen:\n{self.text()}"
            time.sleep(0.01)


def debug_job(
    folder: Path, run: str, *args: str, ranks: int = 1, target: Callable[[], None] | None = None, **env: str
) -> Job:
    """The debug preset, which logs every step, in the run folder `run` of a user's folder."""
    args = ("--preset", "debug", "--train.log-every", "1", "--train.run-dir", run, *args)
    return Job(*args, cwd=folder, ranks=ranks, target=target, XDG_CACHE_HOME=str(folder / "cache"), **env)


def _train(
    args: tuple[str, ...], cwd: str, output: str, env: dict[str, str], target: Callable[..., None] | None
) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["train.py", *args]
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # loader workers are children of this process again
    if target is not None:
        target()
    main()


class Command:
    """A command as a user types it, whatever processes it starts. All that they print goes to one file."""

    def __init__(self, *command: str, cwd: Path, **env: str):
        handle, name = tempfile.mkstemp(dir=cwd, prefix="output-")
        self.file, self._mark = Path(name), f"DETR_TEST_FAMILY={uuid.uuid4()}"
        key, value = self._mark.split("=")
        environ = environment(**env, **{key: value})
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            start_new_session=True,
        )
        os.close(handle)

    def text(self) -> str:
        return self.file.read_text()

    def family(self) -> list[int]:
        """All processes alive that descend from it, also those that lost their parent."""
        alive = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and self._mark.encode() in (folder / "environ").read_bytes():
                    alive.append(int(folder.name))
        return alive

    def wait(self, timeout: float = 240) -> int:
        """The exit code; whatever runs at the timeout is killed and fails the test."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it did not end:\n{self.text()}") from None

    def kill(self) -> None:
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_until(self, happened: Callable[[], object], timeout: float = 200) -> None:
        end = time.monotonic() + timeout
        while not happened():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"it did not happen:\n{self.text()}")
            time.sleep(0.05)


def steps(run_dir: Path) -> list[int]:
    """The training steps in log.jsonl so far; a line that is being written is left out."""
    log = run_dir / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    read = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [record["step"] for record in read if "train/loss" in record]
