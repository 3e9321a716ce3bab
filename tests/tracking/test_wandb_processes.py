"""W&B in real processes: killed, without a key, with a service that is dead or stopped."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.offline_wandb import read_runs
from tests.tracking.nursery import Done, run_process

SERVICE = (
    "started = []\n"
    "class Popen(subprocess.Popen):\n"
    "    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs); started.append(self)\n"
    "subprocess.Popen = Popen\n"
    "logger = start('offline'); logger.log_metrics({'a': 1.0}, 1)\n"
    "[service] = [process for process in started if 'wandb-core' in str(process.args)]\n"
)


@pytest.mark.process
def test_a_disabled_run_does_not_import_wandb(nursery: subprocess.Popen[str], home: Path) -> None:
    code = "logger = start('disabled'); logger.log_metrics({'a': 1.0}, 1); logger.finalize('success')"
    assert run_process(nursery, home, f"{code}; print('wandb' in sys.modules)") == Done(0, "False\n", "")


@pytest.mark.process
def test_without_a_key_nobody_at_a_terminal_is_asked(nursery: subprocess.Popen[str], home: Path) -> None:
    code = (
        "began = time.monotonic(); logger = start(None); logger.log_metrics({'a': 1.0}, 1)\n"
        "logger.finalize('success')  # nothing else waits for the thread that logs\n"
        "print(time.monotonic() - began < 60, sys.stdin.isatty(), sys.stderr.isatty())"
    )
    master, terminal = pty.openpty()
    streams = {0: os.ttyname(terminal), 2: os.ttyname(terminal)}  # W&B asks where both are terminals
    done = run_process(nursery, home, code, streams)
    os.close(terminal)
    os.close(master)
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == "True True True"
    assert [run.values("a") for run in read_runs(home / "run")] == [{1: 1}]


@pytest.mark.process
def test_a_kill_loses_at_most_the_last_seconds_of_an_offline_run(nursery: subprocess.Popen[str], home: Path) -> None:
    code = (
        "from tests.offline_wandb import read_runs\n"
        "def written():\n"
        "    try: return [step for run in read_runs(Path('run')) for step in run.values('a')]\n"
        "    except AssertionError: return []  # not even the file's header\n"
        "logger = start('offline'); logger.log_metrics({'a': 1.0}, 1); logger.log_metrics({'a': 2.0}, 2)\n"
        "end = time.monotonic() + 12  # less than W&B's own 15\n"
        "while written() != [1, 2] and time.monotonic() < end: time.sleep(0.1)\n"
        "logger.log_metrics({'a': 3.0}, 3); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run_process(nursery, home, code).exit_code == -signal.SIGKILL
    (run,) = read_runs(home / "run")
    assert {1: 1, 2: 2}.items() <= run.values("a").items()


@pytest.mark.process
def test_a_dead_wandb_service_costs_one_line(nursery: subprocess.Popen[str], home: Path) -> None:
    code = (
        f"{SERVICE}service.kill(); service.wait()\n"
        "for step in (2, 3): logger.log_metrics({'a': 1.0}, step)\n"
        "logger.finalize('success'); print('trained to the end')"
    )
    done = run_process(nursery, home, code)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and "training goes on" in lines[1] and lines[2] == "trained to the end", done.stderr
    assert done.exit_code == 0


@pytest.mark.process
def test_a_stopped_wandb_service_neither_stops_a_run_nor_keeps_it_from_ending(
    nursery: subprocess.Popen[str], home: Path
) -> None:
    """As on a disk that hangs: its socket fills, and nothing answers."""
    code = (
        f"wandb_logger.FINISH_TIMEOUT, wandb_logger.GRACE = 2.0, 1.0\n{SERVICE}service.send_signal(signal.SIGSTOP)\n"
        "values = {f'value {n}': 1.0 for n in range(100)}\n"
        "for step in range(2, 3000): logger.log_metrics(values, step)\n"
        "logger.finalize('success'); print('trained to the end')"
    )
    began = time.monotonic()
    done = run_process(nursery, home, code)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and "training goes on" in lines[1] and lines[2] == "trained to the end", done
    assert done.exit_code == 0 and "Traceback" not in done.stderr and time.monotonic() - began < 100, done.stderr
