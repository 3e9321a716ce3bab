"""Disks that are full, folders that become read-only or are removed: training goes on, and nothing saved is lost."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from detr_fabric.runtime.checkpoint import load_checkpoint
from tests import faults
from tests.commands import OFTEN, STEPS, debug_job, steps
from tests.data.test_loader import alive
from tests.same_runs import KEPT, assert_same, assert_same_run

pytestmark = pytest.mark.faults


def test_a_full_disk_is_said_survived_and_tried_again(folder: Path) -> None:
    """The limit on the size of files stands for the disk: it can be lifted while the run goes on."""
    minutes = ("--train.checkpoint-minutes", "0.001")
    going = debug_job(folder, "full", *minutes, target=partial(faults.hold, 5, 12))
    going.wait_until(faults.held(folder, 5))
    pid = going.processes[0].pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    faults.release(folder, 5)
    going.wait_until(faults.held(folder, 12))
    assert "can't be written" in going.text()
    before = load_checkpoint(folder / "full" / "last.ckpt")["state"]["step"]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    faults.release(folder, 12)
    assert going.wait() == [0], going.text()
    assert "File too large" in going.text() and 0 < before < 5
    assert_same_run(folder / "full", folder / "whole")


def test_a_run_whose_end_could_not_be_saved_fails_and_can_be_ended_again(folder: Path) -> None:
    going = debug_job(folder, "unsaved", *OFTEN, target=partial(faults.hold, 3))
    going.wait_until(faults.held(folder, 3))
    resource.prlimit(going.processes[0].pid, resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    faults.release(folder, 3)
    assert going.wait() == [2], going.text()
    assert going.text().count("error: ") == 1 and "the final state could not be saved" in going.text()
    assert steps(folder / "unsaved") == list(range(1, STEPS + 1))
    assert debug_job(folder, "unsaved").wait() == [0]
    assert_same_run(folder / "unsaved", folder / "whole")


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A run folder that is a file system of 12 MB."""
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here; a limit on the size of files stands for it")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_on_a_disk_that_is_full_for_a_while_both_checkpoints_stay_and_the_best_is_saved_later(
    folder: Path, small_disk: Path
) -> None:
    """It is full when the first of two evaluations wants to save the best model, which has AP 0 like the second."""
    going = debug_job(folder, "disk", *OFTEN, target=partial(faults.hold, 5, 12))
    going.wait_until(faults.held(folder, 5))
    with pytest.raises(OSError, match="No space left"), open(small_disk / "others.dat", "wb", buffering=0) as file:
        while True:
            file.write(bytes(100_000))
    faults.release(folder, 5)
    going.wait_until(faults.held(folder, 12))
    assert f"step 8: {Path('disk') / 'last.ckpt'} can't be written" in going.text() and "No space left" in going.text()
    found = {name: load_checkpoint(small_disk / name)["state"] for name in ("last.ckpt", "previous.ckpt")}
    assert {name: state["step"] for name, state in found.items()} == {"last.ckpt": 4, "previous.ckpt": 3}
    assert not (small_disk / "best.ckpt").exists()
    (small_disk / "others.dat").unlink()
    faults.release(folder, 12)
    assert going.wait() == [0], going.text()
    assert_same(*({k: load_checkpoint(f / "last.ckpt")[k] for k in KEPT} for f in (small_disk, folder / "whole")))
    assert load_checkpoint(small_disk / "best.ckpt")["state"]["step"] == STEPS


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Permissions don't keep root out: for root, a mount that can't be written to."""
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield
        folder.chmod(0o700)
        return
    for command in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder]):
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("root can't be kept out of a folder here, for mounting is not allowed")
    yield
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_run_folder_that_becomes_read_only_costs_checkpoints_but_not_the_run(folder: Path) -> None:
    run = folder / "read-only"
    going = debug_job(folder, run.name, *OFTEN, target=partial(faults.hold, 4))
    going.wait_until(faults.held(folder, 4))
    try:
        with read_only(run):
            faults.release(folder, 4)
            assert going.wait() == [2], going.text()
    finally:
        going.signal(signal.SIGKILL)
    assert "training goes on" in going.text() and "Traceback" not in going.text()
    assert going.text().count("error: ") == 1 and "the final state could not be saved" in going.text()
    assert load_checkpoint(run / "last.ckpt")["state"]["step"] == 3 and max(steps(run)) == STEPS
    assert debug_job(folder, run.name).wait() == [0]
    assert_same_run(run, folder / "whole")


def test_a_run_folder_that_is_removed_is_made_again(folder: Path) -> None:
    run = folder / "removed"
    going = debug_job(folder, run.name, *OFTEN, target=partial(faults.hold, 4))
    going.wait_until(faults.held(folder, 4))
    shutil.rmtree(run)
    faults.release(folder, 4)
    assert going.wait() == [0], going.text()
    assert going.text().count("removed by somebody") == 1 and steps(run) == list(range(4, STEPS + 1))
    assert_same(*({k: load_checkpoint(f / "last.ckpt")[k] for k in KEPT} for f in (run, folder / "whole")))


def test_a_full_shared_memory_is_one_sentence_and_no_wait_for_a_batch(folder: Path) -> None:
    mount = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/dev/shm"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    going = debug_job(folder, "shm", "--data.workers", "2", target=faults.small_shared_memory)
    assert going.wait(100) == [2], going.text()
    error = going.text().splitlines()[-1]
    assert error.startswith("error: /dev/shm (0.1 MB)") and "--ipc=host" in error and "lower --data.workers" in error
    assert "Traceback" not in going.text() and going.text().count("error: ") == 1


def test_too_few_open_files_are_one_sentence_and_no_wait_for_a_batch(folder: Path) -> None:
    """Whether loading ends depends on where the last file is missing: in a worker or in the trainer."""
    codes = []
    for limit in (22, 25):
        going = debug_job(folder, f"files{limit}", "--data.workers", "2", target=partial(faults.few_files, limit))
        (code,) = going.wait(100)
        codes.append(code)
        assert code == 0 or (
            f"error: {limit} open files, the limit of a process, are too few: raise it by `ulimit -n`" in going.text()
            and "Traceback" not in going.text()
        ), going.text()
    assert 2 in codes


def test_a_loader_process_that_is_killed_during_a_step_is_one_sentence(folder: Path) -> None:
    """As the system does where memory runs out."""
    going = debug_job(folder, "loader", "--data.workers", "2", target=partial(faults.hold, 4))
    going.wait_until(faults.held(folder, 4))
    (pid,) = [process.pid for process in going.processes]
    (children,) = [task.read_text().split() for task in Path(f"/proc/{pid}/task/{pid}").glob("children")]
    os.kill(int(children[-1]), signal.SIGKILL)
    going.wait_until(lambda: not alive(int(children[-1])))
    faults.release(folder, 4)
    assert going.wait() == [2], going.text()
    assert "error: a process that loads images was ended by SIGKILL, perhaps because memory ran out" in going.text()
    assert "Traceback" not in going.text() and "lower --data.workers" in going.text()
