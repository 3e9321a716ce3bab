"""Trains every cell of a study, and tabulates them: python -m detr_fabric.study experiments/mappings_study.py."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from detr_fabric.cli import entry_point, parse
from detr_fabric.errors import UserError
from detr_fabric.runtime.files import writing
from detr_fabric.runtime.preemption import EXIT_PREEMPTED, Preemption
from detr_fabric.study.cells import Cell, cells, final_records, load_study
from detr_fabric.study.settings import ABOUT, PROG, Settings, Study
from detr_fabric.study.table import figure, figure_of_steps, measured, table_of
from detr_fabric.terminal import say

OUTPUT = "output.txt"  # in the folder of a cell: what its run prints
PR_SET_PDEATHSIG = 1
END_WITH_PARENT = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM)  # a killed study's cells save, end


@entry_point()
def main() -> None:
    settings = parse(Settings, sys.argv[1:], PROG, ABOUT)
    study, folder = load_study(settings.file), Path(settings.out) / Path(settings.file).stem
    made, code = cells(study, folder), 0
    unfinished = [cell for cell in made if final_records(cell) is None]
    with writing(str(folder), "choose another folder with --out"):
        if settings.cell is not None:
            become(made, settings.cell, unfinished)
        elif not settings.table:
            say(f"{folder}: {len(made)} cells, {len(made) - len(unfinished)} of them done")
            code = run(unfinished, settings.jobs)
        tabulate(study, made, folder)
    sys.exit(code)


def become(made: Sequence[Cell], number: int, unfinished: Sequence[Cell]) -> None:
    """Makes this process the run of one cell; ends it where that is done."""
    if not 0 <= number < len(made):
        raise UserError(f"--cell {number}: the study has cells 0 to {len(made) - 1}")
    if made[number] not in unfinished:
        say(f"done    {made[number].folder}")
        sys.exit(0)
    command = made[number].command()
    os.execv(command[0], command)


def tabulate(study: Study, made: Sequence[Cell], folder: Path) -> None:
    """Prints and writes the table of all cells that are done."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in study.configs}
    for cell in made:
        if (records := final_records(cell)) is not None:
            runs[cell.name].append(measured(records, cell.config))
    table = table_of(runs, study.steps)
    folder.mkdir(parents=True, exist_ok=True)
    table.write(folder, "table")
    drawn = bool(study.steps) or study.numbers is not None
    if drawn:
        chart = figure_of_steps(table, study.steps) if study.steps else figure(table, study.numbers or "")
        chart.savefig(folder / "figure.png", dpi=150)
    for line in table.text().splitlines():
        say(line)
    say(f"written to {folder}: table.csv, .md, .tex{' and figure.png' if drawn else ''}")


def run(cells: Sequence[Cell], jobs: int) -> int:
    """Runs cells, `jobs` of them at once, each as a process that prints to its folder's output.txt. Returns the exit
    code. A signal that asks this process to stop is passed on: the cells finish their step, save and end."""
    waiting, running, failed, asked = list(cells), dict[subprocess.Popen[bytes], Cell](), False, False
    with Preemption() as preemption:
        while running or (waiting and not asked):
            while waiting and not asked and len(running) < jobs:
                cell = waiting.pop(0)
                running[start(cell, jobs)] = cell
                say(f"started {cell.folder}")
            time.sleep(0.2)
            if preemption.requested is not None and not asked:
                asked = True
                for process in running:
                    process.send_signal(signal.SIGTERM)
            for process in [each for each in running if each.poll() is not None]:
                cell, code = running.pop(process), process.returncode
                stopped = asked and code == EXIT_PREEMPTED
                failed = failed or (code != 0 and not stopped)
                word = "done   " if code == 0 else "saved  " if stopped else "FAILED "
                say(f"{word} {cell.folder}{f', exit code {code}: see {OUTPUT} there' * (word == 'FAILED ')}")
    return EXIT_PREEMPTED if asked else int(failed)


def start(cell: Cell, jobs: int) -> subprocess.Popen[bytes]:
    """The process of a cell, with its part of the threads."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            cell.command(),
            env=os.environ | {"OMP_NUM_THREADS": str(max(1, threads // jobs))},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=END_WITH_PARENT,
        )


if __name__ == "__main__":
    main()
