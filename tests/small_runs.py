"""A run of a small model without data, for tests that take single steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning_fabric import Fabric

from detr_fabric.config import OptimConfig
from detr_fabric.data.formats.categories import Categories
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.model.detr import DETR
from detr_fabric.optimizer import build_optimizer
from detr_fabric.presets import load_preset
from detr_fabric.runtime.preemption import Preemption
from detr_fabric.runtime.run import Run, State
from tests.model.test_detr import small_detr


def small_run(folder: Path, fabric: Fabric, **sizes: Any) -> tuple[DETR, Run]:
    """A model of those sizes, and what a training step of it needs."""
    model = small_detr(last_stage="layer1", **sizes)
    fused = fabric.strategy.precision.precision != "16-mixed"
    wrapped, optimizer = fabric.setup(model.train(), build_optimizer(model, OptimConfig(), fused=fused))
    run = SimpleNamespace(
        cfg=load_preset("debug").resolve(),
        fabric=fabric,
        model=wrapped,
        criterion=SetCriterion(5).to(fabric.device),
        optimizer=optimizer,
        ema=None,
        state=State(),
        softmax_steps=0,
        preemption=Preemption(),
        folder=folder,
        scheduler=SimpleNamespace(step=lambda: None),
        train_loader=SimpleNamespace(dataset=SimpleNamespace(categories=Categories((1, 2, 3, 4, 5), (*"abcde",)))),
    )
    return model, run  # type: ignore[return-value]
