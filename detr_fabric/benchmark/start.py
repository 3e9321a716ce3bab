"""Start-up, in processes of its own: the command's help, and from the command to the first training step."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from detr_fabric.benchmark.measure import Call, PartResult, Row, interleaved, rows
from detr_fabric.errors import UserError

TRAIN = (sys.executable, "-m", "detr_fabric.train")
MODEL = ("--preset", "r18_coco", "--wandb.mode", "disabled", "--train.accelerator", "cpu")
DATA = ("--data.shapes-train", "64", "--data.shapes-val", "8", "--data.workers", "2")
LIMIT_SECONDS = 300


def measure(device: torch.device, quick: bool) -> PartResult:
    """Wall times, with files in the system's cache and the built-in scenes written; beside what the imports alone cost,
    of torch for the help, and of transformers' detector and trainer for the first step."""
    importing = {"import torch, torchvision": "import torch, torchvision"}
    ours: Call = partial(subprocess.run, [*TRAIN, "--help"], check=True, stdout=subprocess.DEVNULL)
    found = _rows("--help", ours, importing, quick)
    importing, missing = {}, []
    try:
        import transformers  # noqa: F401

        importing["import transformers"] = "from transformers import DetrForObjectDetection, Trainer"
    except ImportError:
        missing.append("transformers")
    with tempfile.TemporaryDirectory() as folder:
        found += _rows("first step, resnet18 on the CPU", partial(first_step, Path(folder)), importing, quick)
    return PartResult(found, missing)


def _rows(case: str, ours: Call, importing: dict[str, str], quick: bool) -> list[Row]:
    calls = {"ours": ours}
    for name, code in importing.items():
        calls[name] = partial(subprocess.run, [sys.executable, "-c", code], check=True)
    times = interleaved(calls, 0, torch.device("cpu"), least=1 if quick else 3, warm_up=not quick, wall=True)
    return rows(case, times, unit="run")


def first_step(folder: Path) -> None:
    """Starts a training on the CPU and returns when its first step is in the log; the rest is cut off.

    Raises UserError when it ends, or takes minutes, without one.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    run_dir, output = place / "run", place / "output"
    log = run_dir / "log.jsonl"
    flags = ("--data.shapes-dir", str(folder / "shapes"), "--train.run-dir", str(run_dir), "--train.log-every", "1")
    end = time.perf_counter() + LIMIT_SECONDS
    with open(output, "w") as file:
        process = subprocess.Popen([*TRAIN, *MODEL, *DATA, *flags], stdout=file, stderr=file)
        try:
            while not (log.is_file() and '"train/loss"' in log.read_text()):
                if process.poll() is not None or time.perf_counter() > end:
                    raise UserError(f"training did not reach its first step: {output.read_text()[-500:]}")
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
