"""Checkpoints without a model."""

from __future__ import annotations

from typing import Any


def stored(step: int = 0, **state: Any) -> dict[str, Any]:
    """All that a run goes on from, except weights."""
    return {
        "model": {},
        "optimizer": {},
        "precision": {},
        "state": {"epoch": 0, "step": step, "step_in_epoch": 0, **state},
        "config": {},
        "categories": {"ids": [], "names": [], "label_space": "contiguous"},
        "fingerprint": "",
        "world_size": 1,
        "global_batch": 2,
        "steps_per_epoch": 10,
    }
