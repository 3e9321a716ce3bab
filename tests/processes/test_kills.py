"""A run that is killed anywhere equals, once it is resumed, one that was never killed.

The long form: pytest -m slow -n 0 -s tests/processes/test_kills.py
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import pytest

from detr_fabric.runtime.checkpoint import load_checkpoint
from tests import faults
from tests.commands import OFTEN, STEPS, debug_job, records, steps
from tests.same_runs import assert_same, assert_same_run

pytestmark = pytest.mark.faults

Kind = Literal["setup", "save", "evaluation", "copies", "step"]
"""Where a run is killed: while it sets up, inside a save, inside an evaluation, while a checkpoint gets its names, or
anywhere after a step."""

LONG = ("--eval.every", "1", "--train.keep-every", "1")  # with copies of last.ckpt after every epoch
LONG_STEPS = 80
START = "{}/epoch_0003.ckpt"  # of a fork
KINDS: tuple[Kind, ...] = ("setup", "save", "evaluation", "copies", "step")


@pytest.mark.parametrize(("workers", "kinds"), [("0", ("setup", "save", "step")), ("2", ("step", *KINDS[2:4]))])
def test_a_run_killed_at_random_moments_equals_one_that_never_was(
    folder: Path, workers: str, kinds: tuple[Kind, ...]
) -> None:
    run = f"killed{workers}"
    kills = kill_and_resume(folder, run, kinds, workers, random.Random(workers), more=LONG)
    assert [kill.where for kill in kills] == list(kinds)
    assert_same_run(folder / run, folder / "whole")
    assert_same_files(folder / run, folder / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fork", [False, True], ids=["run", "fork"])
@pytest.mark.parametrize(("ranks", "workers"), [(1, "0"), (1, "2"), (2, "0"), (2, "2")])
def test_sixty_kills_change_nothing(folder: Path, ranks: int, workers: str, fork: bool) -> None:
    """For each number of ranks and workers ten kills of a run and five of a fork, which starts from another run's
    checkpoint with another learning rate: as many of each kind."""
    args, base = (*LONG, "--train.epochs", str(2 * LONG_STEPS * ranks // STEPS)), f"long{ranks}"
    if not (folder / base).exists():
        assert debug_job(folder, base, *args, ranks=ranks).wait() == [0] * ranks
    whole, start, kinds = base, 0, 2 * KINDS
    if fork:
        args += ("--train.resume", START.format(base), "--optim.lr", "3e-4", "--train.allow-config-change")
        whole, start, kinds = f"{base}-fork", load_checkpoint(folder / START.format(base))["state"]["step"], KINDS
        if not (folder / whole).exists():
            assert debug_job(folder, whole, *args, ranks=ranks).wait() == [0] * ranks
    run, chance = f"{whole}-killed{workers}", random.Random(f"{ranks} {workers} {fork}")
    kills = kill_and_resume(folder, run, kinds, workers, chance, ranks, LONG_STEPS, args, start)
    assert_same_run(folder / run, folder / whole, start)
    assert_same_files(folder / run, folder / whole)
    lost = [kill.lost for kill in kills]
    seconds = [kill.seconds for kill in kills if kill.seconds is not None]
    print(
        f"{ranks} ranks, {workers} workers{', fork' * fork}: {len(kills)} kills survived, "
        f"{sum(kill.torn for kill in kills)} left a half-written file; steps lost {sum(lost) / len(lost):.2f} mean, "
        f"{max(lost)} max; seconds from the start of the next life to its first new step "
        f"{sum(seconds) / len(seconds):.1f} mean, {max(seconds):.1f} max"
    )


class Kill(NamedTuple):
    where: Kind
    torn: bool  # a half-written file was left behind
    lost: int  # steps that had been logged but not saved
    seconds: float | None  # from the start of this life to its first step; None: it was killed before


def kill_and_resume(
    folder: Path,
    run: str,
    kinds: tuple[Kind, ...],
    workers: str,
    chance: random.Random,
    ranks: int = 1,
    total: int = STEPS,
    more: tuple[str, ...] = (),
    start: int = 0,
) -> list[Kill]:
    """Kills a run once for each of `kinds`, and then lets it end. It starts at step `start` and ends at `total`."""
    args, log, done = (*OFTEN, "--data.workers", workers, *more), folder / run, list[Kill]()
    inside = folder / faults.INSIDE
    for number, where in enumerate(kinds):
        before = max(steps(log), default=start)
        left = len(kinds) - number  # each life takes a few steps more than it has to
        wanted = before + chance.randint(1, max(1, 2 * (total - before) // left - 8))
        wanted = max(2, before, min(wanted, total - 4 * left))
        inside.unlink(missing_ok=True)
        began, seconds = time.monotonic(), None
        going = debug_job(folder, run, *args, ranks=ranks, target=hanging(where, wanted, chance))
        if where == "setup":
            end = time.monotonic() + chance.random()
            going.wait_until(
                lambda end=end, before=before: time.monotonic() > end or max(steps(log), default=start) > before
            )
        elif where == "step":
            going.wait_until(lambda text=going.text: "folder  " in text())  # the log was cut to the checkpoint
            first = max(steps(log), default=start) + 1
            going.wait_until(lambda first=first: max(steps(log), default=start) >= first)
            seconds = time.monotonic() - began
            going.wait_until(lambda wanted=wanted: max(steps(log), default=start) >= wanted)
            time.sleep(chance.random() * 0.1)
        else:
            going.wait_until(inside.exists)
        going.signal(signal.SIGKILL)
        assert set(going.wait(30)) == {-signal.SIGKILL}, going.text()
        saved = load_checkpoint(log / "last.ckpt")["state"]["step"] if (log / "last.ckpt").exists() else start
        torn = any(log.glob("*.tmp"))
        done.append(Kill(where, torn, max(steps(log), default=start) - saved, seconds))
    assert debug_job(folder, run, *args, ranks=ranks).wait() == [0] * ranks
    assert not list(log.glob("*.tmp"))
    return done


def hanging(where: Kind, step: int, chance: random.Random) -> Callable[[], None] | None:
    """What makes a run wait, from that step on, in a place where it is to be killed."""
    if where == "evaluation":
        return partial(faults.hang_in_evaluation, step, chance.choice(get_args(faults.EvaluationMoment)))
    if where in ("save", "copies"):
        return partial(faults.hang_in_save, step, chance.choice(get_args(faults.Moment)), where == "copies")
    return partial(faults.wait_for_a_signal, step + 3) if where == "step" else None  # lest it ends before it is killed


def assert_same_files(one: Path, other: Path) -> None:
    """All checkpoints of the other run with the same weights, and every evaluation once with the same scores."""
    for name in {file.name for file in other.glob("*.ckpt")} - {"previous.ckpt"}:
        assert_same(*(load_checkpoint(run / name)["model"] for run in (one, other)))
    scores = [
        [
            {k: v for k, v in record.items() if k.startswith("val/") and "seconds" not in k} | {"step": record["step"]}
            for record in records(run)
            if "val/AP" in record
        ]
        for run in (one, other)
    ]
    assert scores[0] == scores[1] and scores[0]


@pytest.mark.slow
def test_four_ranks_resume_bit_for_bit(folder: Path) -> None:
    """From three ranks on, the order in which DDP sums would tell a resumed run from one that never stopped."""
    args = (*OFTEN, "--train.batch-size", "2")
    assert debug_job(folder, "whole4", *args, ranks=4).wait() == [0] * 4
    for run, step in (("four3", 3), ("four9", 9)):
        going = debug_job(folder, run, *args, ranks=4, target=partial(faults.hold, step))
        going.wait_until(faults.held(folder, step))
        going.signal(signal.SIGKILL)
        going.wait()
        (folder / f"held-{step}").unlink()
        assert debug_job(folder, run, *args, ranks=4).wait() == [0] * 4
        assert_same_run(folder / run, folder / "whole4")


def test_a_damaged_last_checkpoint_gives_way_to_the_previous_one_and_it_is_said(folder: Path) -> None:
    assert debug_job(folder, "damaged", *OFTEN, "--train.max-steps", "3").wait() == [0]
    last = folder / "damaged" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    (folder / "damaged" / "last.ckpt.tmp").write_text("left over")
    resumed = debug_job(folder, "damaged")
    assert resumed.wait() == [0], resumed.text()
    assert "last.ckpt" in resumed.text() and "going on from previous.ckpt" in resumed.text()
    assert "resumed at step 2" in resumed.text() or "resumed at step 3" in resumed.text()
    assert_same_run(folder / "damaged", folder / "whole")
