"""Measures this machine: training's and evaluation's parts, ours beside a baseline in the same run.

python -m detr_fabric.benchmark [PART ...] [--json FILE] [--quick] [--data.root coco]
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from detr_fabric.benchmark.settings import ABOUT, PROG, Part, Settings
from detr_fabric.cli import entry_point, parse
from detr_fabric.errors import UserError
from detr_fabric.terminal import say


@entry_point()
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(Settings, sys.argv[1:] if argv is None else argv, PROG, ABOUT)
    record = run(settings)
    if settings.json is not None:
        try:
            Path(settings.json).write_text(json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {settings.json}: {error.strerror}; name a file elsewhere") from error
    if any("failed" in part for part in record["parts"].values()):
        sys.exit(1)


def run(settings: Settings) -> dict[str, Any]:
    """Measures the parts one after the other and prints each table; returns the record that --json writes."""
    import torch

    from detr_fabric.benchmark import measure

    cuda = torch.cuda.is_available()
    if settings.accelerator == "cuda" and not cuda:
        raise UserError("--accelerator cuda: no CUDA device is visible; use auto or cpu")
    device = torch.device("cuda" if cuda and settings.accelerator != "cpu" else "cpu")
    torch.set_num_threads(settings.threads)
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": measure.commit(),
        "machine": measure.machine(device),
        "versions": measure.versions(),
        "quick": settings.quick,
        "parts": {},
    }
    machine = record["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {settings.threads} of {machine['cores']} cores"
    say(f"{where}; torch {torch.__version__}; commit {record['commit']}")
    for name in settings.parts or get_args(Part):
        part = importlib.import_module(f"detr_fabric.benchmark.{name}")
        of_data = (settings.data.root and Path(settings.data.root),) if name == "data" else ()
        try:
            found = part.measure(device, settings.quick, *of_data)
        except Exception as error:  # the other parts' figures are worth having
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            sentence = " ".join(f"{kind}{error}".split())
            record["parts"][name] = {"rows": [], "missing": [], "failed": sentence}
            say()
            say(f"{name} failed: {sentence[:500]}")
            continue
        record["parts"][name] = {"rows": found.rows, "missing": found.missing}
        say()
        for line in measure.table(name, found.rows).splitlines():
            say(line)
        for package in found.missing:
            say(f"{package} is not installed: its rows are left out")
    return record


if __name__ == "__main__":
    main()
