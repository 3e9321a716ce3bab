"""Whole training, from JPEG files to moved weights, in a process of its own: what the loader keeps the device from."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch

from detr_fabric.benchmark.data import write_images
from detr_fabric.benchmark.measure import PartResult
from detr_fabric.benchmark.start import TRAIN
from detr_fabric.errors import UserError

FILES = 32  # each of them stands for many images, so that an epoch is long
RECORDS, WARM_UP = 8, 3  # records of the run's log that are looked at, and before them those that are not
MOST_WORKERS = 16


def measure(device: torch.device, quick: bool) -> PartResult:
    """Images a second and the share of time spent waiting for data, medians over the log of a run: on a GPU of
    ResNet-50 at COCO's scales, 8 images a batch; on a CPU of ResNet-18 at a share of them."""
    full = device.type == "cuda" and not quick
    backbone, batch, per_record = ("resnet50", 8, 25) if full else ("resnet18", 2, 1 if quick else 4)
    scales = () if full else ("--data.scales", "128", "160", "--data.max-size", "256", "--data.crop", "False")
    workers = min(MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) - 1))
    warm_up, records = (1, 2) if quick else (WARM_UP, RECORDS)
    steps = per_record * (warm_up + records)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, 4 if quick else FILES, batch * steps)
        images, file = str(folder / "train2017"), str(folder / "annotations" / "instances_train2017.json")
        command = [
            *TRAIN,
            *("--train.run-dir", str(folder / "run")),
            *("--data.train-images", images, "--data.train-annotations", file, "--data.workers", str(workers)),
            *("--data.val-images", images, "--data.val-annotations", file, "--data.val-limit", "1", *scales),
            *("--model.backbone", backbone, "--model.backbone-weights", "none", "--model.norm", "frozen"),
            *("--model.freeze", "stem", "layer1", "--train.batch-size", str(batch), "--train.max-steps", str(steps)),
            *("--train.log-every", str(per_record), "--train.accelerator", device.type, "--wandb.mode", "disabled"),
            *("--eval.attention-images", "0", "--wandb.panel-images", "0"),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise UserError(f"training did not run: {run.stderr[-500:]}")
        log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    speeds = [record for record in log if "images_per_second" in record][warm_up:]
    found = {key: statistics.median(record[key] for record in speeds) for key in ("images_per_second", "data_wait")}
    row = {
        "case": f"{backbone}, batch {batch}, {workers} loading processes",
        "name": "ours",
        "ms": 1e3 / found["images_per_second"],
        "images/s": found["images_per_second"],
        "data wait": found["data_wait"],
        "rounds": len(speeds),
    }
    return PartResult([row])
