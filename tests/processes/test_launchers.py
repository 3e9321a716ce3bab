"""Several ranks as torchrun and --train.devices start them: one dies, all are told to stop, all come back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from detr_fabric.runtime.checkpoint import load_checkpoint
from detr_fabric.runtime.preemption import MARKER
from tests.commands import REPOSITORY, Command, Job, records, steps
from tests.same_runs import assert_same_run

pytestmark = pytest.mark.faults

FAULTY = ("-m", "detr_fabric.train", "--preset", str(REPOSITORY / "tests" / "faulty.py"))
OWN = (*FAULTY, "--train.devices", "2")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SIGNALS = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
STEPS = 8  # of the debug preset on two ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder; "whole" is a run on two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("user")
    assert job(folder, "whole").wait() == [0, 0]
    return folder


def job(folder: Path, run: str) -> Job:
    args = ("--preset", FAULTY[-1], "--train.run-dir", run)
    return Job(*args, cwd=folder, ranks=2, XDG_CACHE_HOME=str(folder / "cache"))


def command(folder: Path, *args: str, **env: str) -> Command:
    (folder / "died").unlink(missing_ok=True)
    return Command(*args, cwd=folder, XDG_CACHE_HOME=str(folder / "cache"), **env)


def assert_nobody_is_left(going: Command) -> None:
    end = time.monotonic() + 60
    while going.family():
        if time.monotonic() > end:
            left = going.family()
            going.kill()
            raise AssertionError(f"{left} are left:\n{going.text()}")
        time.sleep(0.05)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("launcher", "fault"),
    [
        ("own", "die 1 3 raise"),
        pytest.param("own", "die 0 3 raise", marks=slow),
        pytest.param("own", "die 1 3 kill", marks=slow),
        pytest.param("own", "die 0 3 kill", marks=slow),
        pytest.param("torchrun", "die 1 3 raise", marks=slow),
        pytest.param("torchrun", "die 0 3 kill", marks=slow),
    ],
)
def test_when_one_rank_dies_all_end_and_its_error_is_said_once(folder: Path, launcher: str, fault: str) -> None:
    args = (*(OWN if launcher == "own" else (*TORCHRUN, *FAULTY)), "--train.run-dir", f"{launcher} {fault}")
    going = command(folder, *args, FAULT=fault)
    going.wait_until((folder / "died").exists)
    died = time.monotonic()
    assert going.wait(60) != 0
    assert_nobody_is_left(going)
    assert time.monotonic() - died < 60
    said = going.text()
    print(f"{launcher} {fault}: all have ended after {time.monotonic() - died:.1f} s")
    assert "lost contact" not in said and "gloo" not in said.replace("distributed_backend=gloo", "")
    if "raise" in fault:
        assert said.count("ValueError: something of its own") == 1 and said.count("in train_epoch") == 1
    elif launcher == "own":
        assert said.count("error: ") == 1 and f"error: rank {fault.split()[1]} was ended by SIGKILL" in said
    else:
        assert "detr_fabric/" not in said and "error: " not in said  # torchrun tells the exit code
    assert max(steps(folder / f"{launcher} {fault}")) == 2


def test_torchrun_restarts_a_run_whose_rank_was_killed_from_its_last_checkpoint(folder: Path) -> None:
    """No folder is named: the second life finds that of the first and takes over its lock."""
    fault = {"FAULT": "die 1 4 kill", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    restarting = (*TORCHRUN, "--max-restarts", "2", *FAULTY, "--train.checkpoint-minutes", "0")
    going = command(folder, *restarting, **fault)
    assert going.wait() == 0, going.text()
    assert_nobody_is_left(going)
    (run,) = (folder / "runs").iterdir()
    assert going.text().count(", resumed at step 3") == 1
    assert_same_run(run, folder / "whole")


@pytest.mark.parametrize(
    ("number", "whom"),
    [
        (signal.SIGUSR1, "agent"),
        pytest.param(signal.SIGTERM, "agent", marks=slow),
        pytest.param(signal.SIGINT, "group", marks=slow),
        pytest.param(signal.SIGTERM, "everyone", marks=slow),  # as SLURM does at the time limit
    ],
)
def test_a_signal_to_torchrun_saves_leaves_the_marker_and_the_same_command_goes_on(
    folder: Path, number: int, whom: str
) -> None:
    run = folder / f"torchrun {number} {whom}"
    args = (*TORCHRUN, *SIGNALS, *FAULTY, "--train.run-dir", run.name, "--data.workers", "2")
    going = command(folder, *args, FAULT="wait_for_a_signal 3")
    going.wait_until(lambda: len(steps(run)) == 2)
    signalled = time.monotonic()
    if whom == "group":
        os.killpg(going.process.pid, number)
    else:
        for pid in going.family() if whom == "everyone" else [going.process.pid]:
            os.kill(pid, number)
    assert going.wait(60) == 1  # whatever the ranks return
    assert_nobody_is_left(going)
    print(f"{run.name}: all have ended after {time.monotonic() - signalled:.1f} s")
    assert (run / MARKER).read_text() == "3\n" and load_checkpoint(run / "last.ckpt")["state"]["step"] == 3
    assert "detr_fabric/" not in going.text(), going.text()
    if whom == "agent" and number == signal.SIGTERM:
        resumed = command(folder, *args)
        assert resumed.wait() == 0, resumed.text()
    else:
        assert job(folder, run.name).wait() == [0, 0]
    assert not (run / MARKER).exists()
    assert_same_run(run, folder / "whole")


BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "a.sh"}


@pytest.mark.parametrize(
    ("number", "whom"),
    [
        (signal.SIGUSR1, "launcher"),
        pytest.param(signal.SIGINT, "group", marks=slow),  # Ctrl+C
        pytest.param(signal.SIGTERM, "everyone", marks=slow),
    ],
)
def test_a_signal_to_ranks_of_our_own_saves_and_the_same_command_goes_on(
    folder: Path, number: signal.Signals, whom: str
) -> None:
    """Inside a batch job, whose variables name two tasks although nobody called srun."""
    run = folder / f"own {number.name}"
    args = (*OWN, "--train.run-dir", run.name, "--data.workers", "2")
    going = command(folder, *args, FAULT="wait_for_a_signal 3", **BATCH)
    going.wait_until(lambda: len(steps(run)) == 2)
    if whom == "group":
        os.killpg(going.process.pid, number)
    else:
        for pid in going.family() if whom == "everyone" else [going.process.pid]:
            os.kill(pid, number)
    assert going.wait(60) == 75, going.text()
    assert_nobody_is_left(going)
    assert (run / MARKER).read_text() == "3\n" and "error: " not in going.text()
    resumed = command(folder, *args, **BATCH)
    assert resumed.wait() == 0, resumed.text()
    assert [r["step"] for r in records(run) if "grad_norm" in r] == list(range(1, STEPS + 1))
    assert_same_run(run, folder / "whole")


@slow
def test_a_second_interrupt_ends_ranks_of_our_own_at_once(folder: Path) -> None:
    going = command(folder, *OWN, "--train.run-dir", "twice", FAULT="wait_for_a_signal 3 0")
    going.wait_until(lambda: len(steps(folder / "twice")) == 2)
    going.process.send_signal(signal.SIGSTOP)  # so that both are there when it goes on
    going.process.send_signal(signal.SIGINT)
    going.process.send_signal(signal.SIGCONT)
    going.wait_until(lambda: "SIGINT" in going.text())
    going.process.send_signal(signal.SIGINT)
    assert going.wait(40) in (130, 75) and "error: " not in going.text(), going.text()
    assert_nobody_is_left(going)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("own", marks=slow)])
def test_ranks_whose_launcher_is_killed_save_end_and_the_same_command_goes_on(folder: Path, launcher: str) -> None:
    run = folder / f"orphans of {launcher}"
    args = (*(OWN if launcher == "own" else (*TORCHRUN, *FAULTY)), "--train.run-dir", run.name)
    going = command(folder, *args, FAULT="wait_for_a_signal 3")
    going.wait_until(lambda: len(steps(run)) == 2)
    going.process.kill()
    killed = time.monotonic()
    assert_nobody_is_left(going)
    print(f"the ranks have ended after {time.monotonic() - killed:.1f} s")
    assert (run / MARKER).read_text() == "3\n"
    assert job(folder, run.name).wait() == [0, 0]
    assert_same_run(run, folder / "whole")


def test_srun_starts_ranks_and_one_that_waits_for_others_ends_at_a_signal(folder: Path) -> None:
    step = {**BATCH, "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    ranks = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    args = (*FAULTY, "--train.run-dir", "srun")
    alone = command(folder, *args, **step | ranks[0])
    alone.wait_until(lambda: "Initializing distributed" in alone.text())
    alone.process.send_signal(signal.SIGTERM)
    assert alone.wait(20) == -signal.SIGTERM
    both = [command(folder, *args, **step | rank) for rank in ranks]
    assert [rank.wait() for rank in both] == [0, 0], "".join(rank.text() for rank in both)
    assert_same_run(folder / "srun", folder / "whole")
