"""What the reported cases of training and of faults have in common: commands in a folder, and what must be seen."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests import faults
from tests.coco_files import coco, image, thing, write_root
from tests.commands import Job, debug_job, python

STEPS_AN_EPOCH = 8  # of debug_job on one rank
SMALL = ("--data.scales", "32", "--data.max-size", "64", "--data.crop", "False", "--model.backbone-weights", "none")
ALLOWED = "--train.allow-config-change"
OFTEN = ("--train.checkpoint-minutes", "0")


class NotHeld(AssertionError):
    """What a case shows is still there."""


class NotRun(Exception):
    """A case can't be run here, and why."""


def see(holds: object, what: str) -> None:
    if not holds:
        raise NotHeld(what)


def end(job: Job, *codes: int, timeout: float = 150) -> str:
    """Waits for a run and returns what it printed; codes: one of which it ends with."""
    try:
        found = job.wait(timeout)[0]
    except AssertionError:
        raise NotHeld(f"it did not end in {timeout:.0f} s") from None
    text = job.text()
    see(found in codes, f"exit code {found} instead of {codes[0]}: {last_line(text)}")
    see("Traceback" not in text, f"a traceback: {last_line(text)}")
    return text


def run(at: Path, name: str, *args: str, code: int = 0, timeout: float = 150, **env: str) -> str:
    """The debug preset in the run folder `name`."""
    return end(debug_job(at, name, *args, **env), code, timeout=timeout)


def kill(at: Path, name: str, *args: str, target: Callable[[], None], happened: Callable[[], object]) -> None:
    """Starts a run with a fault in it, and kills it when that has happened."""
    job = debug_job(at, name, *args, target=target)
    job.wait_until(happened)
    job.signal(signal.SIGKILL)
    job.wait()


def kill_before(at: Path, name: str, step: int, *args: str) -> None:
    """Kills a run that saves every step when it comes to a step."""
    kill(at, name, *OFTEN, *args, target=partial(faults.hold, step), happened=faults.held(at, step))
    (at / f"held-{step}").unlink()


def kill_inside(at: Path, name: str, *args: str, target: Callable[[], None]) -> None:
    inside = at / faults.INSIDE
    kill(at, name, *OFTEN, *args, target=target, happened=inside.exists)
    inside.unlink()


def command(at: Path, *args: str, code: int | None = 0, timeout: float = 90, **env: str) -> str:
    """python ARGS as a user types it; what it printed. code None: any but that of a traceback."""
    try:
        done = python(*args, cwd=at, timeout=timeout, **{"XDG_CACHE_HOME": str(at / "cache"), **env})
    except subprocess.TimeoutExpired:
        raise NotHeld(f"it did not end in {timeout:.0f} s") from None
    text = done.stdout + done.stderr
    see("Traceback" not in text, f"a traceback: {last_line(text)}")
    see(code is None or done.returncode == code, f"exit code {done.returncode} instead of {code}: {last_line(text)}")
    return text


def base(at: Path, *args: str) -> Path:
    """A finished run that other cases start from, made once."""
    if not (at / "base" / "epoch_0001.ckpt").exists():
        run(at, "base", "--train.keep-every", "1", *args)
    return at / "base"


def write_data(root: Path, names: tuple[str, str] = ("cat", "dog"), val_objects: bool = True) -> Path:
    """A small data set in COCO's layout: 16 images to train on, 8 to validate on."""
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]

    def split(count: int, objects: bool) -> dict[str, Any]:
        things = [thing(n, n, category=1 + n % 2) for n in range(count)] if objects else []
        return coco([image(n) for n in range(count)], things, categories)

    return write_root(root, split(16, True), split(8, val_objects))


def mount_small_shared_memory() -> None:
    """Raises NotRun where file systems can't be mounted."""
    mount = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/dev/shm"]
    if subprocess.run(mount, capture_output=True).returncode:
        raise NotRun("mounting a file system is not allowed here")


def full_shared_memory(at: Path) -> None:
    mount_small_shared_memory()
    job = debug_job(at, "shm", "--data.workers", "2", target=faults.small_shared_memory)
    see("--ipc=host" in end(job, 2, timeout=60), "the cure is not named")


def at_once(at: Path) -> None:
    """Three runs that start together without --train.run-dir get a folder each."""
    args = ("--preset", "debug", "--train.max-steps", "1", "--train.seed")
    jobs = [Job(*args, str(seed), cwd=at, XDG_CACHE_HOME=str(at / "cache")) for seed in range(3)]
    for job in jobs:
        end(job, 0)
    see(len(list((at / "runs").iterdir())) == 3, f"folders {sorted(os.listdir(at / 'runs'))}")


def evaluates_where_output_is(at: Path, encoding: str) -> None:
    out = at / f"{encoding}.json"
    args = ("-m", "detr_fabric.evaluate", "base/last.ckpt", "--confusion", "0.5", "--out", str(out))
    base(at)
    command(at, *args, PYTHONIOENCODING=encoding)
    see(out.is_file(), "--out was not written")


def last_line(text: str) -> str:
    return ascii((text.strip().splitlines() or ["nothing printed"])[-1][:160])[1:-1]
