"""Two runs are the same: weights, moments and logged losses, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from detr_fabric.runtime.checkpoint import load_checkpoint
from tests.commands import records, steps

KEPT = ("model", "optimizer", "precision", "categories", "fingerprint")


def assert_same_run(one: Path, other: Path, start: int = 0) -> None:
    """Weights, moments and every logged loss are equal to the last bit, and every step after `start` is logged once."""
    kept = (*KEPT, "ema")
    assert_same(*({k: v for k, v in load_checkpoint(run / "last.ckpt").items() if k in kept} for run in (one, other)))
    losses = [
        [list(losses_of(record).items()) for record in records(run) if "grad_norm" in record] for run in (one, other)
    ]
    assert losses[0] == losses[1]
    assert steps(one) == list(range(start + 1, start + len(losses[0]) + 1))


def losses_of(record: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if k.startswith(("train/", "lr/")) or k in ("step", "epoch", "grad_norm")}


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other
