"""Everything that only a GPU can show, in one table and within 20 minutes:

python -m detr_fabric.benchmark.gpu [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from detr_fabric.benchmark import attention, measure, step, train
from detr_fabric.benchmark.measure import Row
from detr_fabric.benchmark.settings import GPU_ABOUT, GPU_PROG, GpuSettings
from detr_fabric.benchmark.start import TRAIN
from detr_fabric.cli import entry_point, parse
from detr_fabric.config import AttnConfig
from detr_fabric.errors import UserError
from detr_fabric.model.build import build_model
from detr_fabric.terminal import say

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 400  # of the tests, and of quickstart
TARGETS = {"images/s": 88, "data wait": 0.05}  # at least; at most


@entry_point()
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(GpuSettings, sys.argv[1:] if argv is None else argv, GPU_PROG, GPU_ABOUT)
    if settings.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is visible, and this measures one; --accelerator cpu --quick shows that it would run")
    device, quick = torch.device(settings.accelerator), settings.quick
    parts: dict[str, Callable[[], list[Row]]] = {
        "tests": lambda: gpu_tests(quick),
        "step": lambda: step.measure(device, quick).rows,
        "waits": lambda: waits(device, quick),
        "attention": lambda: sparse_attention(device, quick),
        "train": lambda: end_to_end(device, quick),
        "quickstart": lambda: quickstart(device, quick),
    }
    machine, found = measure.machine(device), list[Row]()
    say(f"{machine['gpu'] or machine['cpu']}; torch {torch.__version__}; commit {measure.commit()}")
    for name, part in parts.items():
        began = time.perf_counter()
        try:
            rows = part()
        except Exception as error:  # the other parts' figures are worth having
            rows = [{"case": name, "name": f"failed: {type(error).__name__}: {error}"[:100].replace("\n", " ")}]
        found += [row | {"case": f"{name}: {row['case']}"} for row in rows]
        say(f"{name} took {time.perf_counter() - began:.0f} s")
    for line in measure.table("part", found).splitlines():
        say(line)
    if settings.json is not None:
        record = {"machine": machine, "versions": measure.versions(), "commit": measure.commit(), "rows": found}
        Path(settings.json).write_text(json.dumps(record, indent=1) + "\n")
    if any(str(row["name"]).startswith("failed") for row in found):
        sys.exit(1)


def gpu_tests(quick: bool) -> list[Row]:
    """The tests marked gpu, in a process of their own; quick: only collected."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider", "tests"]
    extra = ["--collect-only"] if quick else []
    run = subprocess.run([*command, *extra], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    last = (run.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    return [{"case": "pytest -m gpu", "name": last if run.returncode == 0 else f"failed: {last}"}]


def waits(device: torch.device, quick: bool) -> list[Row]:
    """How often the host waits for the device in a step: once, for the costs that it matches by."""
    batch, targets = step.make_batch([(64, 96)] * 2, device)
    config = step.model_config("resnet18")
    call = step.our_step(build_model(config, AttnConfig(), step.CLASSES).to(device).train(), batch, targets, bf16=True)
    call()
    if device.type != "cuda":
        return [{"case": "one step", "name": "ours", "waits": None}]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [{"case": "one step", "name": "ours", "waits": sum("synchronizing" in str(w.message) for w in said)}]


def sparse_attention(device: torch.device, quick: bool) -> list[Row]:
    """Each mapping beside PyTorch's own attention, with and without the fused kernel; nothing is compiled."""
    shapes = ["self 100x100"] if quick else list(attention.SHAPES)[:3]
    return attention.measure(device, quick=True, seconds=0.1 if quick else 5.0, shapes=shapes).rows


def end_to_end(device: torch.device, quick: bool) -> list[Row]:
    """From JPEG files to moved weights, beside what is to be reached on an H100."""
    target = {"case": "on an H100 at least, data wait at most", "name": "target", **TARGETS}
    return [*train.measure(device, quick).rows, target]


def quickstart(device: torch.device, quick: bool) -> list[Row]:
    """The whole preset, evaluations included; quick: two steps of the debug preset."""
    preset = ["--preset", "debug", "--train.max-steps", "2"] if quick else ["--preset", "quickstart"]
    with tempfile.TemporaryDirectory() as name:
        flags = ["--train.run-dir", f"{name}/run", "--train.accelerator", device.type, "--wandb.mode", "disabled"]
        began = time.perf_counter()
        run = subprocess.run([*TRAIN, *preset, *flags], capture_output=True, text=True, timeout=LIMIT_SECONDS)
        if run.returncode != 0:
            raise UserError(f"training did not run: {run.stderr[-300:]}")
        seconds = time.perf_counter() - began
        log = [json.loads(line) for line in Path(name, "run", "log.jsonl").read_text().splitlines()]
    ap50 = [record["val/AP50"] for record in log if "val/AP50" in record]
    return [{"case": preset[1], "name": f"ours, {seconds:.0f} s", "AP50": ap50[-1] if ap50 else None}]


if __name__ == "__main__":
    main()
