"""Faults put into a running process: targets of a Job, and through tests/faulty.py of any launcher."""

from __future__ import annotations

import ctypes
import io
import os
import resource as limits
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from detr_fabric import build, loop
from detr_fabric.data.batch import MicroBatch, Target
from detr_fabric.evaluate import detect
from detr_fabric.runtime import resume
from detr_fabric.runtime.run import Run
from detr_fabric.tracking.recorder import Recorder
from tests.patching import patch

Moment = Literal["write", "fsync", "link", "replace", "second replace"]
EvaluationMoment = Literal["detected", "scored", "recorded"]
INSIDE = "inside"  # a file that appears where a run hangs to be killed


def before_step(step: int, action: Callable[[loop.Run], object]) -> None:
    """Does something on every rank before it takes a step."""
    whole = loop.training_step

    def changed(run: loop.Run, micro_batches: list[MicroBatch]) -> loop.Step:
        if run.state.step + 1 == step:
            action(run)
        return whole(run, micro_batches)

    patch(loop, "training_step", changed)


def die(rank: int, step: int, how: Literal["kill", "raise"]) -> None:
    """One rank is killed or raises, the first time that this folder's runs come to a step."""

    def action(run: loop.Run) -> None:
        if run.fabric.global_rank != rank or Path("died").exists():
            return
        Path("died").touch()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("something of its own")

    before_step(step, action)


def wait_for_a_signal(step: int, rank: int | None = None) -> None:
    """A step begins only after this rank, or all of them, got the signal that the test sends."""

    def action(run: loop.Run) -> None:
        if rank in (None, run.fabric.global_rank):
            until(lambda: run.preemption.requested)

    before_step(step, action)


def wait_in_evaluation() -> None:
    """The first evaluation begins only after the signal that the test sends."""
    whole = loop.finish_epoch

    def waiting(run: Run, *rest: Any) -> None:
        Path("in-evaluation").touch()
        until(lambda: run.preemption.requested)
        whole(run, *rest)

    patch(loop, "finish_epoch", waiting)


def wait_in_setup() -> None:
    """Setting up goes on when the test calls release(folder, 0)."""
    whole = build.build_datasets

    def waiting(*args: Any) -> Any:
        _held(0)
        return whole(*args)

    patch(build, "build_datasets", waiting)


def hold(*steps: int) -> None:
    """Before each of these steps the run waits until the test calls release(folder, step)."""
    for step in steps:
        before_step(step, lambda run, step=step: _held(step))


def _held(step: int) -> None:
    Path(f"held-{step}").touch()
    until(Path(f"go-{step}").exists)
    for name in (f"held-{step}", f"go-{step}"):
        Path(name).unlink()


def held(folder: Path, step: int) -> Callable[[], bool]:
    """Whether the run waits before that step."""
    return (folder / f"held-{step}").exists


def release(folder: Path, step: int) -> None:
    (folder / f"go-{step}").touch()


def lose_output() -> None:
    """Both standard streams are pipes that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (1, 2):
        os.dup2(writer, stream)


def open_terminal() -> None:
    """The run belongs to a terminal, whose name is in TERMINAL; it waits at step 4."""
    os.setsid()
    terminal = os.open(os.environ["TERMINAL"], os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(terminal, stream)
    hold(4)


def few_files(limit: int) -> None:
    """So many files may be open at once."""
    limits.setrlimit(limits.RLIMIT_NOFILE, (limit, limit))


def small_shared_memory() -> None:
    """/dev/shm has 64 kB, for this process and its children."""
    assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", "/dev/shm"], check=True)


def take_objects_away(rank: int) -> None:
    """This rank sees images without a single object; in the second step no rank sees any."""
    whole = loop.training_step

    def empty(target: Target) -> Target:
        return target._replace(labels=target.labels[:0], boxes=target.boxes[:0])

    def changed(run: loop.Run, micro_batches: list[MicroBatch]) -> loop.Step:
        if run.fabric.global_rank == rank or run.state.step + 1 == 2:
            micro_batches = [(batch, [empty(target) for target in targets]) for batch, targets in micro_batches]
        return whole(run, micro_batches)

    patch(loop, "training_step", changed)


def hang_in_save(step: int, moment: Moment, copies: bool = False) -> None:
    """The first checkpoint of at least so many steps is never finished: it waits in the middle to be killed.

    copies: the first that gets other names too; there the first rename is of a copy, and the second of last.ckpt.
    """
    whole, saves = torch.save, resume.save_checkpoint
    armed, replaced, named = False, 0, False

    def pause(here: Moment) -> None:
        if armed and here == moment:
            Path(INSIDE).touch()
            time.sleep(100)

    def save_named(*args: Any, names: Sequence[str] = ()) -> None:
        nonlocal named
        named = len(names) > 0
        saves(*args, names=names)

    def save(content: Any, file: Any, **options: Any) -> None:
        nonlocal armed, replaced
        if not isinstance(content, dict):  # a tensor on its way to another rank
            return whole(content, file, **options)
        armed, replaced = content["state"]["step"] >= step and named >= copies, 0
        buffer = io.BytesIO()
        whole(content, buffer)
        data = buffer.getvalue()
        file.write(data[: len(data) // 2])
        file.flush()
        pause("write")
        file.write(data[len(data) // 2 :])

    def wrapped(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*args: Any) -> Any:
            nonlocal replaced
            replaced += name == "replace"
            pause("second replace" if replaced == 2 else name)  # type: ignore[arg-type]
            return original(*args)

        return call

    patch(resume, "save_checkpoint", save_named)
    patch(torch, "save", save)
    for name in ("fsync", "link", "replace"):
        patch(os, name, wrapped(name))


def hang_in_evaluation(step: int, moment: EvaluationMoment) -> None:
    """The first evaluation after at least so many steps waits to be killed: after its first batch was detected, with
    its scores, or once these are recorded."""
    owner, name = {"detected": (detect, "detect_batch"), "scored": (detect, "score")}.get(
        moment, (Recorder, "evaluation")
    )
    whole, finish, armed = getattr(owner, name), loop.finish_epoch, False

    def hanging(*args: Any) -> Any:
        result = whole(*args)
        if armed:
            Path(INSIDE).touch()
            time.sleep(100)
        return result

    def arm(run: Run, *rest: Any) -> None:
        nonlocal armed
        armed = run.state.step >= step
        finish(run, *rest)

    patch(owner, name, hanging)
    patch(loop, "finish_epoch", arm)


def until(happened: Callable[[], object], timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end, "the test did not send what was waited for"
        time.sleep(0.01)
