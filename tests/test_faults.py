"""What a run survives: kills, signals, full disks, damaged files, with real processes, and what it does then."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fabric.checkpoint import load_checkpoint, save_checkpoint
from detr_fabric.signals import EXIT_PREEMPTED, MARKER
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


def job(folder: Path, run: str, *args: str, ranks: int = 1, **env: str) -> Job:
    args = (*DEBUG, "--train.run-dir", run, *args)
    return Job(*args, cwd=folder, ranks=ranks, XDG_CACHE_HOME=str(folder / "cache"), **env)


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
    kill_and_resume(folder, run, kills=3, ranks=1, workers=workers, chance=random.Random(workers))
    assert_same_run(folder / run, folder / "whole")


def kill_and_resume(
    folder: Path, run: str, kills: int, ranks: int, workers: str, chance: random.Random
) -> list[dict[str, Any]]:
    """Kills a run `kills` times at random moments and lets it end. Returns what each kill cost."""
    args, costs = (*OFTEN, "--data.workers", workers), []
    log = folder / run
    for _ in range(kills):
        before = max(steps(log), default=0)
        started = time.monotonic()
        going = job(folder, run, *args, ranks=ranks)
        wanted = before + chance.randrange(-(-(STEPS // ranks) // kills) + 1)
        wanted = min(wanted, STEPS // ranks - 1)
        going.wait_until(
            lambda wanted=wanted, text=going.text: "folder  " in text() and max(steps(log), default=0) >= wanted
        )
        time.sleep(chance.random() * 0.3)
        going.signal(signal.SIGKILL)
        going.wait(30)
        written = max(steps(log), default=0)
        saved = load_checkpoint(log / "last.ckpt")["state"]["step"] if (log / "last.ckpt").exists() else 0
        costs.append(
            {"inside a save": any(log.glob("*.tmp")), "lost": written - saved, "seconds": time.monotonic() - started}
        )
    assert job(folder, run, *args, ranks=ranks).wait() == [0] * ranks
    assert not list(log.glob("*.tmp"))
    return costs


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


# ---- signals


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
