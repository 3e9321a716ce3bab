"""Studies: killed and continued, cells that fail, signals, one cell alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from detr_fabric.config import Config
from detr_fabric.study.__main__ import run
from detr_fabric.study.cells import Cell
from tests.commands import Command, python, steps
from tests.patching import Patch
from tests.same_runs import assert_same_run

STUDY = """
from dataclasses import replace
from detr_fabric.config import AttnConfig
from detr_fabric.study.settings import Study
from experiments.debug import config
config = replace(config, train=replace(config.train, log_every=1))
short = replace(config, attn=AttnConfig(kind="sparsemax"), train=replace(config.train, max_steps=2))
study = Study({"softmax": config, "sparsemax": short}, seeds=(42,))
"""


@pytest.mark.faults
def test_a_killed_study_goes_on_where_it_was_and_its_cells_equal_runs_that_nothing_happened_to(folder: Path) -> None:
    (folder / "two.py").write_text(STUDY)
    args, first = ("-m", "detr_fabric.study", "two.py", "--out", "studies"), folder / "studies/two/softmax-seed42"
    going = Command(*args, cwd=folder, XDG_CACHE_HOME=str(folder / "cache"))
    going.wait_until(lambda: len(steps(first)) >= 2)
    os.kill(going.process.pid, signal.SIGKILL)
    going.process.wait()
    end = time.monotonic() + 60
    while going.family() and time.monotonic() < end:  # its cell is asked to stop, and saves
        time.sleep(0.1)
    assert not going.family() and (first / "preempted").exists() and len(steps(first)) < 16

    done = python(*args, cwd=folder, XDG_CACHE_HOME=str(folder / "cache"))
    assert done.returncode == 0 and "2 cells, 0 of them done" in done.stdout, done.stdout + done.stderr
    assert_same_run(first, folder / "whole")
    assert "resume" in (first / "output.txt").read_text()
    again = python(*args, cwd=folder)
    assert again.returncode == 0 and "2 of them done" in again.stdout and "started" not in again.stdout
    table = python(*args, "--table", cwd=folder).stdout.splitlines()
    assert [line.split()[:2] for line in table[:3]] == [
        ["configuration", "seeds"],
        ["softmax", "1"],
        ["sparsemax", "1"],
    ]
    alone = python(*args, "--cell", "1", cwd=folder)
    assert alone.returncode == 0 and alone.stdout == "done    studies/two/sparsemax-seed42\n"


def made(tmp_path: Path, patch: Patch, *codes: str) -> list[Cell]:
    """Cells that run Python code instead of a training."""
    patch(Cell, "command", lambda cell: [sys.executable, "-c", codes[int(cell.name)]])
    return [Cell(str(number), Config(), tmp_path / str(number)) for number in range(len(codes))]


def test_a_cell_that_fails_is_named_with_its_output_and_does_not_end_the_others(
    tmp_path: Path, patch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    cells = made(tmp_path, patch, "print('why'); exit(2)", "import os; print(os.environ['OMP_NUM_THREADS'])", "pass")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "6")
        assert run(cells, jobs=2) == 1
    said = capfd.readouterr().out.splitlines()
    assert said[:2] == [f"started {tmp_path}/0", f"started {tmp_path}/1"]
    assert f"FAILED  {tmp_path}/0, exit code 2: see output.txt there" in said
    assert f"done    {tmp_path}/1" in said and f"done    {tmp_path}/2" in said
    assert [(cell.folder / "output.txt").read_text() for cell in cells] == ["why\n", "3\n", ""]


def test_a_study_that_is_asked_to_stop_passes_it_on_waits_and_starts_nothing_more(tmp_path: Path, patch: Patch) -> None:
    waits = "import pathlib, signal, sys; signal.signal(15, lambda *_: sys.exit(75)); pathlib.Path('{}').touch(); "
    ready = tmp_path / "ready"
    cells = made(tmp_path, patch, waits.format(ready) + "signal.pause()", "pass")

    def ask() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    assert run(cells, jobs=1) == 75
    assert not cells[1].folder.exists()


def test_one_cell_is_the_training_itself(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(
        STUDY.replace("study =", "config = replace(config, data=replace(config.data, root='nowhere'))\nstudy =")
    )
    started = python("-m", "detr_fabric.study", "two.py", "--cell", "0", cwd=tmp_path)
    assert started.returncode == 2 and started.stderr.startswith("error: nowhere"), started.stderr
    none = python("-m", "detr_fabric.study", "two.py", "--cell", "2", cwd=tmp_path)
    assert (none.returncode, none.stderr) == (2, "error: --cell 2: the study has cells 0 to 1\n")
