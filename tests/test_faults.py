"""What a run survives: kills, signals, full disks, damaged files, with real processes, and what it does then."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch

from detr_fabric.checkpoint import load_checkpoint, save_checkpoint
from detr_fabric.signals import EXIT_PREEMPTED, MARKER
from tests import faults
from tests.offline_wandb import read_runs
from tests.processes import Job, records, steps

pytestmark = pytest.mark.faults

STEPS = 16  # of the debug preset on one rank
DEBUG = ("--preset", "debug", "--train.log-every", "1")
OFTEN = ("--train.checkpoint-minutes", "0")  # after every step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder; "whole" is a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("user")
    assert job(folder, "whole").wait() == [0]
    return folder


def job(
    folder: Path, run: str, *args: str, ranks: int = 1, target: Callable[[], None] | None = None, **env: str
) -> Job:
    args = (*DEBUG, "--train.run-dir", run, *args)
    return Job(*args, cwd=folder, ranks=ranks, target=target, XDG_CACHE_HOME=str(folder / "cache"), **env)


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, moments and every logged loss are equal to the last bit, and every step is logged once."""
    assert_same(*({k: v for k, v in load_checkpoint(run / "last.ckpt").items() if k in KEPT} for run in (one, other)))
    losses = [
        [list(losses_of(record).items()) for record in records(run) if "grad_norm" in record] for run in (one, other)
    ]
    assert losses[0] == losses[1]
    assert steps(one) == list(range(1, len(losses[0]) + 1))


KEPT = ("model", "optimizer", "lr_scheduler", "epoch", "categories", "data")


def losses_of(record: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if k.startswith(("train/", "lr/")) or k in ("step", "epoch", "grad_norm")}


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


# ---- checkpoints


def test_two_different_complete_checkpoints_exist_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is looked at before and after every system call that changes a name."""
    last, seen = tmp_path / "last.ckpt", []
    content = {"model": {"w": torch.ones(3)}, "config": {}, "categories": {}}

    def valid() -> set[int]:
        found = set()
        for name in ("last.ckpt", "previous.ckpt"):
            if (tmp_path / name).exists():
                found.add(load_checkpoint(tmp_path / name)["step"])
        return found

    for name in ("replace", "link", "fsync"):
        original = getattr(os, name)

        def watched(*args: Any, original: Any = original) -> None:
            seen.append(valid())
            original(*args)
            seen.append(valid())

        monkeypatch.setattr(os, name, watched)
    for step in range(4):
        save_checkpoint(last, {**content, "step": step})
        if step == 1:
            seen.clear()
    assert len(seen) > 8 and all(len(found) == 2 for found in seen)
    assert valid() == {3, 2} and {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_killed_at_random_moments_equals_one_that_never_was(folder: Path, workers: str) -> None:
    run = f"killed{workers}"
    kills = kill_and_resume(folder, run, kills=3, workers=workers, chance=random.Random(workers))
    assert [kill.where for kill in kills] == ["setup", "save", "step"]
    assert_same_run(folder / run, folder / "whole")


LONG = ("--train.epochs", "10", "--eval.every", "5")  # 80 steps on one rank


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("ranks", "workers"), [(1, "0"), (1, "2"), (2, "0"), (2, "2")])
def test_thirty_six_kills_change_nothing(folder: Path, ranks: int, workers: str) -> None:
    """Nine kills each: three while setting up, three in the middle of a save, three anywhere else."""
    whole, run = f"long{ranks}", f"long{ranks}-killed{workers}"
    if not (folder / whole).exists():
        assert job(folder, whole, *LONG, ranks=ranks).wait() == [0] * ranks
    chance = random.Random(f"{ranks} {workers}")
    kills = kill_and_resume(folder, run, 9, workers, chance, ranks, 80 // ranks, LONG)
    assert_same_run(folder / run, folder / whole)
    lost = [kill.lost for kill in kills]
    seconds = [kill.seconds for kill in kills if kill.seconds is not None]
    print(
        f"{ranks} ranks, {workers} workers: {len(kills)} kills survived, {sum(kill.torn for kill in kills)} left "
        f"a half-written file; steps lost {sum(lost) / len(lost):.2f} mean, {max(lost)} max; seconds from the start of "
        f"the next life to its first new step {sum(seconds) / len(seconds):.1f} mean, {max(seconds):.1f} max"
    )


class Kill(NamedTuple):
    where: str  # setup, step, save
    torn: bool  # a half-written file was left behind
    lost: int  # steps that had been logged but not saved
    seconds: float | None  # from the start of this life to its first step; None: it was killed before


def kill_and_resume(
    folder: Path,
    run: str,
    kills: int,
    workers: str,
    chance: random.Random,
    ranks: int = 1,
    total: int = STEPS,
    more: tuple[str, ...] = (),
) -> list[Kill]:
    """Kills a run `kills` times, in turn while it sets up, inside a save and anywhere else, and lets it end."""
    args, log, done = (*OFTEN, "--data.workers", workers, *more), folder / run, list[Kill]()
    inside = folder / faults.INSIDE
    for number in range(kills):
        where = ("setup", "save", "step")[number % 3]
        before = max(steps(log), default=0)
        left = kills - number  # each life takes a few steps more than it has to
        wanted = before + chance.randint(1, max(1, 2 * (total - before) // left - 8))
        wanted = max(2, min(wanted, total - 4 * left))
        inside.unlink(missing_ok=True)
        moment = chance.choice(get_args(faults.Moment))
        hang = partial(faults.hang_in_save, wanted, moment) if where == "save" else None
        began, seconds = time.monotonic(), None
        going = job(folder, run, *args, ranks=ranks, target=hang)
        if where != "setup":
            going.wait_until(lambda text=going.text: "folder  " in text())  # the log was cut to the checkpoint
            first = max(steps(log), default=0) + 1
            going.wait_until(lambda first=first: max(steps(log), default=0) >= first)
            seconds = time.monotonic() - began
        if where == "save":
            going.wait_until(inside.exists)
        elif where == "step":
            going.wait_until(lambda wanted=wanted: max(steps(log), default=0) >= wanted)
        if where == "setup":
            end = time.monotonic() + chance.random()
            going.wait_until(
                lambda end=end, before=before: time.monotonic() > end or max(steps(log), default=0) > before
            )
        elif where == "step":
            time.sleep(chance.random() * 0.1)
        going.signal(signal.SIGKILL)
        assert set(going.wait(30)) == {-signal.SIGKILL}, going.text()
        saved = load_checkpoint(log / "last.ckpt")["state"]["step"] if (log / "last.ckpt").exists() else 0
        torn = any(log.glob("*.tmp"))
        done.append(Kill(where, torn, max(steps(log), default=0) - saved, seconds))
    assert job(folder, run, *args, ranks=ranks).wait() == [0] * ranks
    assert not list(log.glob("*.tmp"))
    return done


@pytest.mark.slow
def test_four_ranks_resume_bit_for_bit(folder: Path) -> None:
    """From three ranks on, the order in which DDP sums would tell a resumed run from one that never stopped."""
    args = (*OFTEN, "--train.batch-size", "2")
    assert job(folder, "whole4", *args, ranks=4).wait() == [0] * 4
    for run, step in (("four3", 3), ("four9", 9)):
        going = job(folder, run, *args, ranks=4, target=partial(faults.hold, step))
        going.wait_until(faults.held(folder, step))
        going.signal(signal.SIGKILL)
        going.wait()
        (folder / f"held-{step}").unlink()
        assert job(folder, run, *args, ranks=4).wait() == [0] * 4
        assert_same_run(folder / run, folder / "whole4")


def test_a_damaged_last_checkpoint_gives_way_to_the_previous_one_and_it_is_said(folder: Path) -> None:
    assert job(folder, "damaged", *OFTEN, "--train.max-steps", "3").wait() == [0]
    last = folder / "damaged" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    (folder / "damaged" / "last.ckpt.tmp").write_text("left over")
    resumed = job(folder, "damaged")
    assert resumed.wait() == [0], resumed.text()
    assert "last.ckpt" in resumed.text() and "going on from previous.ckpt" in resumed.text()
    assert "resumed at step 2" in resumed.text() or "resumed at step 3" in resumed.text()
    assert_same_run(folder / "damaged", folder / "whole")


def test_a_full_disk_is_said_survived_and_tried_again(folder: Path) -> None:
    """The limit on the size of files stands for the disk: it can be lifted while the run goes on."""
    going = job(folder, "full", "--train.checkpoint-minutes", "0.001")
    last = folder / "full" / "last.ckpt"
    going.wait_until(last.exists)
    pid = going.processes[0].pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    going.wait_until(lambda: "can't be written" in going.text())
    before = load_checkpoint(last)["state"]["step"]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert going.wait() == [0], going.text()
    assert "File too large" in going.text() and 0 < before < STEPS
    assert_same_run(folder / "full", folder / "whole")


def test_a_run_whose_end_could_not_be_saved_fails_and_can_be_ended_again(folder: Path) -> None:
    going = job(folder, "unsaved", *OFTEN)
    going.wait_until((folder / "unsaved" / "previous.ckpt").exists)
    resource.prlimit(going.processes[0].pid, resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    assert going.wait() == [2], going.text()
    assert going.text().count("error: ") == 1 and "the final state could not be saved" in going.text()
    assert steps(folder / "unsaved") == list(range(1, STEPS + 1))
    assert job(folder, "unsaved").wait() == [0]
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
    going = job(folder, "disk", *OFTEN, target=partial(faults.hold, 5, 12))
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
    going = job(folder, run.name, *OFTEN, target=partial(faults.hold, 4))
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
    assert job(folder, run.name).wait() == [0]
    assert_same_run(run, folder / "whole")


def test_a_run_folder_that_is_removed_is_made_again(folder: Path) -> None:
    run = folder / "removed"
    going = job(folder, run.name, *OFTEN, target=partial(faults.hold, 4))
    going.wait_until(faults.held(folder, 4))
    shutil.rmtree(run)
    faults.release(folder, 4)
    assert going.wait() == [0], going.text()
    assert going.text().count("removed by somebody") == 1 and steps(run) == list(range(4, STEPS + 1))
    assert_same(*({k: load_checkpoint(f / "last.ckpt")[k] for k in KEPT} for f in (run, folder / "whole")))


# ---- a rank without work


def test_a_rank_whose_images_hold_no_object_neither_hangs_nor_breaks_the_other(folder: Path) -> None:
    going = job(folder, "empty", "--train.max-steps", "4", ranks=2, target=partial(faults.take_objects_away, 1))
    assert going.wait() == [0, 0], going.text()
    logged = [record for record in records(folder / "empty") if "grad_norm" in record]
    assert [r["step"] for r in logged] == [1, 2, 3, 4]
    assert all(0 < r["grad_norm"] < float("inf") and r["train/loss"] > 0 for r in logged)
    assert [r["train/loss_bbox"] == 0 for r in logged] == [False, True, False, False]


# ---- nobody reads what it says


def test_training_goes_on_when_its_output_is_a_broken_pipe(folder: Path) -> None:
    assert job(folder, "pipe", target=faults.lose_output).wait() == [0]
    assert_same_run(folder / "pipe", folder / "whole")


def test_training_goes_on_when_its_terminal_is_closed(folder: Path) -> None:
    """The kernel sends SIGHUP, and what is printed from then on fails."""
    master, terminal = pty.openpty()
    going = job(folder, "closed", target=faults.open_terminal, TERMINAL=os.ttyname(terminal), TERM="xterm")
    going.wait_until(faults.held(folder, 4))
    os.close(terminal)
    assert b"built-in synthetic shapes" in os.read(master, 100_000)
    os.close(master)
    faults.release(folder, 4)
    assert going.wait() == [0]
    assert_same_run(folder / "closed", folder / "whole")


# ---- signals


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigterm_to_every_process_of_a_run_does_not_take_its_loader_workers_away(folder: Path) -> None:
    """As SLURM does at the time limit."""
    run = folder / "everyone"
    going = job(folder, run.name, "--data.workers", "2", target=partial(faults.hold, 3))
    going.wait_until(faults.held(folder, 3))
    trainer = going.processes[0].pid
    workers = children(trainer)
    assert len(workers) == 2
    for pid in (*workers, trainer):
        os.kill(pid, signal.SIGTERM)
    faults.release(folder, 3)
    assert going.wait(60) == [EXIT_PREEMPTED], going.text()
    assert load_checkpoint(run / "last.ckpt")["state"]["step"] == 3 and (run / MARKER).exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert job(folder, run.name).wait() == [0]
    assert_same_run(run, folder / "whole")


def test_a_signal_while_setting_up_waits_for_the_first_step(folder: Path) -> None:
    run = folder / "early"
    going = job(folder, run.name, target=faults.wait_in_setup)
    going.wait_until(faults.held(folder, 0))
    going.signal(signal.SIGUSR1)
    going.wait_until(lambda: "SIGUSR1" in going.text())
    faults.release(folder, 0)
    assert going.wait(60) == [EXIT_PREEMPTED], going.text()
    assert load_checkpoint(run / "last.ckpt")["state"]["step"] == 1 and (run / MARKER).read_text() == "1\n"
    assert job(folder, run.name).wait() == [0]
    assert_same_run(run, folder / "whole")


def test_a_signal_during_evaluation_saves_and_the_evaluation_is_made_up_for(folder: Path) -> None:
    run = folder / "evaluating"
    going = job(folder, run.name, target=faults.wait_in_evaluation)
    going.wait_until((folder / "in-evaluation").exists)
    going.signal(signal.SIGTERM)
    assert going.wait(60) == [EXIT_PREEMPTED], going.text()
    state = load_checkpoint(run / "last.ckpt")["state"]
    assert (state["step"], state["evaluated"]) == (STEPS // 2, 0)
    assert job(folder, run.name).wait() == [0]
    assert_same_run(run, folder / "whole")
    scores = [
        [(r["step"], r["val/AR100"], r["val/AP"]) for r in records(folder / name) if "val/AP" in r]
        for name in ("evaluating", "whole")
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 2


def test_wandb_learns_that_a_run_comes_back_and_nobody_learns_its_key(folder: Path) -> None:
    canary, run = "canary" + 34 * "7", folder / "wandb-run"
    env = {"WANDB_API_KEY": canary, "HOME": str(folder), "WANDB_ERROR_REPORTING": "false"}
    args = ("--wandb.mode", "offline")
    going = job(folder, run.name, *args, target=partial(faults.wait_for_a_signal, 3), **env)
    going.wait_until(lambda: len(steps(run)) == 2)
    going.signal(signal.SIGUSR1)
    assert going.wait(100) == [EXIT_PREEMPTED], going.text()
    assert job(folder, run.name, *args, "--train.max-steps", "4", **env).wait(100) == [0]
    first, second = read_runs(run)
    assert (first.preempting, second.preempting, first.id) == (True, False, second.id)
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"last.ckpt", "config.json", "log.jsonl", "debug.log"} <= {path.name for path in files}
    assert not [path for path in files if canary.encode() in path.read_bytes()]
    assert not [path for path in folder.glob("output-*") if canary in path.read_text()]


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGUSR1, 2)])
def test_a_signal_to_any_rank_saves_and_the_same_command_goes_on(folder: Path, number: int, ranks: int) -> None:
    run = folder / f"signal{number}"
    reference = folder / "whole" if ranks == 1 else folder / "whole2"
    if not reference.exists():
        assert job(folder, "whole2", ranks=2).wait() == [0, 0]
    going = job(folder, run.name, ranks=ranks)
    going.wait_until(lambda: len(steps(run)) >= 2)
    going.signal(number, ranks - 1)
    going.signal(signal.SIGHUP)
    assert going.wait(60) == [EXIT_PREEMPTED, 0][:ranks], going.text()
    state = load_checkpoint(run / "last.ckpt")["state"]
    assert state["step"] == max(steps(run)) < STEPS // ranks and (run / MARKER).read_text() == f"{state['step']}\n"
    assert "Traceback" not in going.text()
    resumed = job(folder, run.name, ranks=ranks)
    assert resumed.wait() == [0] * ranks and not (run / MARKER).exists()
    assert_same_run(run, reference)


def test_a_second_interrupt_quits_at_once(folder: Path) -> None:
    going = job(folder, "twice", "--eval.batch-size", "1")
    going.wait_until(lambda: len(steps(folder / "twice")) >= 2)
    going.signal(signal.SIGSTOP)
    going.signal(signal.SIGINT)
    going.signal(signal.SIGCONT)
    going.wait_until(lambda: "SIGINT" in going.text())
    going.signal(signal.SIGINT)
    assert going.wait(20)[0] in (-signal.SIGINT, EXIT_PREEMPTED)


def test_slurm_is_asked_to_requeue_the_job(folder: Path) -> None:
    tools = folder / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\n')
    (tools / "scontrol").chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "3"}
    going = job(folder, "slurm", "--train.requeue", SLURM_JOB_ID="42", **env)
    going.wait_until(lambda: steps(folder / "slurm"))
    going.signal(signal.SIGUSR1)
    assert going.wait(60) == [EXIT_PREEMPTED], going.text()
    assert (folder / "asked").read_text() == "requeue 41_3\n" and "41_3 is requeued" in going.text()


# ---- the folder and its settings


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_dead(folder: Path) -> None:
    first = job(folder, "locked", "--data.workers", "2")
    first.wait_until(lambda: steps(folder / "locked"))
    second = job(folder, "locked")
    assert second.wait() == [2]
    assert second.text().count("\n") == 1 and f"process {first.processes[0].pid} on" in second.text()
    first.signal(signal.SIGKILL)
    first.wait()
    assert job(folder, "locked").wait() == [0]  # though the first one's loader workers may live for a moment
    assert_same_run(folder / "locked", folder / "whole")


def test_settings_that_change_the_result_are_refused_unless_allowed(folder: Path) -> None:
    assert job(folder, "settings", "--train.max-steps", "2").wait() == [0]
    refused = job(folder, "settings", "--optim.lr", "0.01", "--data.flip", "0", "--train.log-every", "5")
    assert refused.wait() == [2]
    (line,) = refused.text().splitlines()
    assert "--optim.lr was 0.0001 and is now 0.01" in line and "--data.flip was 0.5" in line and "log" not in line
    allowed = job(folder, "settings", "--optim.lr", "0.01", "--train.allow-config-change", "--train.max-steps", "4")
    assert allowed.wait() == [0], allowed.text()
    assert "optim.lr: 0.0001 -> 0.01" in allowed.text()
    rates = [record["lr/transformer"] for record in records(folder / "settings") if "lr/transformer" in record]
    assert rates == [0.0001, 0.0001, 0.01, 0.01]
    other = job(folder, "settings", "--data.shapes-train", "72", "--train.max-steps", "4")
    assert other.wait() == [2] and "the training data are others" in other.text()


def test_another_number_of_ranks_goes_on_with_the_same_epochs(folder: Path) -> None:
    assert job(folder, "ranks", "--train.max-steps", "3").wait() == [0]
    going = job(folder, "ranks", ranks=2)
    assert going.wait() == [0, 0], going.text()
    assert "1 -> 2 ranks: 16 images a step instead of 8, from inside an epoch" in going.text()
    logged = [(r["step"], r["epoch"]) for r in records(folder / "ranks") if "grad_norm" in r]
    assert logged == [
        (1, 1 / 8),
        (2, 2 / 8),
        (3, 3 / 8),
        (4, 2 / 4),
        (5, 3 / 4),
        (6, 1),
        *((6 + i, 1 + i / 4) for i in range(1, 5)),
    ]
    same = job(folder, "ranks2", "--train.max-steps", "3")
    assert same.wait() == [0]
    same = job(folder, "ranks2", "--train.batch-size", "4", ranks=2)
    assert same.wait() == [0, 0] and "the same images in every step" in same.text()
    whole, two = ([r["train/loss"] for r in records(folder / run) if "grad_norm" in r] for run in ("whole", "ranks2"))
    assert two[:3] == whole[:3] and two[3] == pytest.approx(whole[3], rel=0.05)
