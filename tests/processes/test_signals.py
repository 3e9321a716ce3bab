"""Signals: the run saves, says so, and the same command continues it. A closed terminal or pipe does not stop it."""

from __future__ import annotations

import os
import pty
import signal
from functools import partial
from pathlib import Path

import pytest

from detr_fabric.runtime.checkpoint import load_checkpoint
from detr_fabric.runtime.preemption import EXIT_PREEMPTED, MARKER
from tests import faults
from tests.commands import STEPS, debug_job, records, steps
from tests.offline_wandb import read_runs
from tests.same_runs import assert_same_run

pytestmark = pytest.mark.faults


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigterm_to_every_process_of_a_run_does_not_take_its_loader_workers_away(folder: Path) -> None:
    """As SLURM does at the time limit."""
    run = folder / "everyone"
    going = debug_job(folder, run.name, "--data.workers", "2", target=partial(faults.hold, 3))
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
    assert debug_job(folder, run.name).wait() == [0]
    assert_same_run(run, folder / "whole")


def test_a_signal_while_setting_up_waits_for_the_first_step(folder: Path) -> None:
    run = folder / "early"
    going = debug_job(folder, run.name, target=faults.wait_in_setup)
    going.wait_until(faults.held(folder, 0))
    going.signal(signal.SIGUSR1)
    going.wait_until(lambda: "SIGUSR1" in going.text())
    faults.release(folder, 0)
    assert going.wait(60) == [EXIT_PREEMPTED], going.text()
    assert load_checkpoint(run / "last.ckpt")["state"]["step"] == 1 and (run / MARKER).read_text() == "1\n"
    assert debug_job(folder, run.name).wait() == [0]
    assert_same_run(run, folder / "whole")


def test_a_signal_during_evaluation_saves_and_the_evaluation_is_made_up_for(folder: Path) -> None:
    run = folder / "evaluating"
    going = debug_job(folder, run.name, target=faults.wait_in_evaluation)
    going.wait_until((folder / "in-evaluation").exists)
    going.signal(signal.SIGTERM)
    assert going.wait(60) == [EXIT_PREEMPTED], going.text()
    state = load_checkpoint(run / "last.ckpt")["state"]
    assert (state["step"], state["evaluated"]) == (STEPS // 2, 0)
    assert debug_job(folder, run.name).wait() == [0]
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
    going = debug_job(folder, run.name, *args, target=partial(faults.wait_for_a_signal, 3), **env)
    going.wait_until(lambda: len(steps(run)) == 2)
    going.signal(signal.SIGUSR1)
    assert going.wait() == [EXIT_PREEMPTED], going.text()
    assert debug_job(folder, run.name, *args, "--train.max-steps", "4", **env).wait() == [0]
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
        assert debug_job(folder, "whole2", ranks=2).wait() == [0, 0]
    not_to_the_end = partial(faults.wait_for_a_signal, STEPS // ranks - 1, ranks - 1)
    going = debug_job(folder, run.name, ranks=ranks, target=not_to_the_end)
    going.wait_until(lambda: len(steps(run)) >= 2)
    going.signal(number, ranks - 1)
    going.signal(signal.SIGHUP)
    assert going.wait(60) == [EXIT_PREEMPTED, 0][:ranks], going.text()
    state = load_checkpoint(run / "last.ckpt")["state"]
    assert state["step"] == max(steps(run)) < STEPS // ranks and (run / MARKER).read_text() == f"{state['step']}\n"
    assert "Traceback" not in going.text()
    resumed = debug_job(folder, run.name, ranks=ranks)
    assert resumed.wait() == [0] * ranks and not (run / MARKER).exists()
    assert_same_run(run, reference)


def test_a_second_interrupt_quits_at_once(folder: Path) -> None:
    not_to_the_end = partial(faults.wait_for_a_signal, STEPS - 1)
    going = debug_job(folder, "twice", "--eval.batch-size", "1", target=not_to_the_end)
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
    not_to_the_end = partial(faults.wait_for_a_signal, STEPS - 1)
    going = debug_job(folder, "slurm", "--train.requeue", target=not_to_the_end, SLURM_JOB_ID="42", **env)
    going.wait_until(lambda: steps(folder / "slurm"))
    going.signal(signal.SIGUSR1)
    assert going.wait(60) == [EXIT_PREEMPTED], going.text()
    assert (folder / "asked").read_text() == "requeue 41_3\n" and "41_3 is requeued" in going.text()


def test_training_goes_on_when_its_output_is_a_broken_pipe(folder: Path) -> None:
    assert debug_job(folder, "pipe", target=faults.lose_output).wait() == [0]
    assert_same_run(folder / "pipe", folder / "whole")


def test_training_goes_on_when_its_terminal_is_closed(folder: Path) -> None:
    """The kernel sends SIGHUP, and what is printed from then on fails."""
    master, terminal = pty.openpty()
    going = debug_job(folder, "closed", target=faults.open_terminal, TERMINAL=os.ttyname(terminal), TERM="xterm")
    going.wait_until(faults.held(folder, 4))
    os.close(terminal)
    assert b"built-in synthetic shapes" in os.read(master, 100_000)
    os.close(master)
    faults.release(folder, 4)
    assert going.wait() == [0]
    assert_same_run(folder / "closed", folder / "whole")
