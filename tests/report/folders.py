"""Run folders as training leaves them, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detr_fabric.config import AttnConfig, Config, OptimConfig, TrainConfig

START = {
    "step": 0,
    "time": "2026-11-26T12:00:00+00:00",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "device": "cpu",
    "ranks": 1,
    "images_per_step": 8,
    "parameters": 1234567,
    "softmax_steps": 0,
}


def training(step: int, speed: float = 4.0, **more: Any) -> dict[str, Any]:
    losses = {"train/loss": 10 / step, "train/loss_ce": 1 / step, "train/loss_ce_0": 2 / step, "grad_norm": 0.5}
    return {"step": step, "epoch": step / 10, **losses, "lr/transformer": 1e-4, "images_per_second": speed, **more}


def evaluation(step: int, ap: float, **more: Any) -> dict[str, Any]:
    scores = {f"val/{name}": value for name, value in (("AP", ap), ("AP50", 2 * ap), ("APs", -1.0))}
    layers = {f"attention/decoder_cross/layer{layer}/zeros": 0.2 * layer for layer in (0, 1)}
    return {"step": step, "epoch": step / 10, **scores, "val/loss": 1.0, "val/seconds": 36.0, **layers, **more}


def best(f1: float, threshold: float) -> dict[str, Any]:
    return {"f1": f1, "threshold": threshold, "precision": 0.75, "recall": 0.5, "objects": 7}


FIGURES = {
    "step": 30,
    "F1": best(0.5, 0.25),
    "F1_class": {"cat": best(0.625, 0.375), "dog": best(0.125, 0.0625)},
    "duplicates": {"pairs": 3, "detections": 12, "rate": 0.25, "threshold": 0.5, "iou": 0.8},
    "calibration": {
        "error": 0.125,
        "bins": [
            {"from": k / 10, "to": (k + 1) / 10, "score": None, "precision": None, "detections": 0}
            if k % 2
            else {"from": k / 10, "to": (k + 1) / 10, "score": k / 10 + 0.05, "precision": k / 10, "detections": 9}
            for k in range(10)
        ],
    },
    "tide": {
        "AP50": 0.25,
        "delta_AP50": {
            "localisation": 0.125, "classification": 0.0625, "duplicate": 0.0,
            "background": 0.25, "both": 0.0, "missed": 0.5,
        },
        "counts": {
            "localisation": 5, "classification": 4, "duplicate": 3, "background": 2, "both": 1, "missed": 6,
        },
    },
}  # fmt: skip

RECORDS = [
    training(10),
    evaluation(10, 0.25, **{"val/AP_class/cat": 0.5, "val/AP_class/dog": 0.0}),
    training(20),
    {"step": 25, "epoch": 2.5, "dropped_steps": 1, "dropped": "a sentence"},
    training(30),
    evaluation(30, 0.125, **{"val/AP_class/cat": 0.25, "val/AP_class/dog": 0.0}),
]


def write_run(
    folder: Path,
    name: str,
    records: list[dict[str, Any]],
    attn: AttnConfig | None = None,
    lr: float = 1e-4,
    **start: Any,
) -> Path:
    """A run's folder; start: what starts.jsonl says other than START."""
    config = Config(attn=attn or AttnConfig(), optim=OptimConfig(lr=lr), train=TrainConfig(name=name)).resolve()
    run = folder / name
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "starts.jsonl").write_text(json.dumps(START | start) + "\n")
    return run
