"""Runs → the file: of the command, and at the end of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detr_fabric.report.collect import collect
from detr_fabric.report.page import write_page
from detr_fabric.report.records import read_run
from detr_fabric.report.runs import find_runs
from detr_fabric.report.settings import Settings
from detr_fabric.runtime.files import check_outputs
from detr_fabric.tracking.console import Progress


def report(path: Path, settings: Settings) -> None:
    """Writes the page. Raises UserError for runs, data or a file that aren't there."""
    runs = find_runs(settings.runs)
    logs = [run.folder / name for run in runs if run.folder is not None for name in ("log.jsonl", "config.json")]
    check_outputs(f"--out {path}", [path], [*logs, *(run.checkpoint for run in runs)])
    records, explored = [read_run(run) for run in runs], dict[str, Any]()
    if settings.images > 0 or settings.image_ids:
        from detr_fabric.report.explore import explore

        explored = explore(runs, settings)
    rows, configs = explored.pop("rows", {}), explored.pop("configs", {})
    content = collect([run._replace(config=run.config or configs.get(n, {})) for n, run in enumerate(records)])
    for number, row in rows.items():
        known = content["runs"][number]["row"]
        known |= {name: value for name, value in row.items() if known.get(name) is None}
    write_page(path, content | explored)


def report_after_training(folder: Path, attention: bool) -> None:
    """Writes report.html into a run's folder, and says so. That it fails is one sentence, never an error."""
    say = Progress(epochs=0, total_steps=0).say  # silent once nobody reads it
    path = folder / "report.html"
    try:
        report(path, Settings((str(folder),), images=Settings.images if attention else 0))
        say(f"report  {path}: curves, settings and classes in a browser")
    except Exception as error:  # no page is worth a training
        say(f"{path}: not written ({type(error).__name__}: {error}); python -m detr_fabric.report {folder} tries again")
