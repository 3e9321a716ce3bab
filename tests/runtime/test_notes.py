"""Settings without effect are said, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from detr_fabric.config import AttnConfig, Config, DataConfig, OptimConfig, TrainConfig
from detr_fabric.runtime.notes import notes


def said(**changes: Any) -> list[str]:
    return notes(replace(Config(), **changes).resolve(), steps_per_epoch=100)


def test_the_recipe_needs_no_note() -> None:
    assert said() == []
    assert said(optim=OptimConfig(schedule="one-cycle", warmup=0.2), attn=AttnConfig(kind="entmax", alpha=1.3)) == []
    assert said(optim=OptimConfig(warmup_steps=50), train=TrainConfig(max_steps=200)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": OptimConfig(warmup=0.05)}, "--optim.warmup 0.05 has no effect under --optim.schedule step"),
        ({"optim": OptimConfig(schedule="one-cycle", warmup_steps=9)}, "--optim.warmup-steps has no effect"),
        ({"optim": OptimConfig(schedule="constant", lr_drop=3)}, "--optim.lr-drop 3 has no effect"),
        ({"train": TrainConfig(epochs=50)}, "--optim.lr-drop 200 comes after the last epoch, 50"),
        ({"optim": OptimConfig(lr=1e-5, lr_backbone=1e-4)}, "--optim.lr-backbone 0.0001 is above --optim.lr 1e-05"),
        ({"attn": AttnConfig(alpha=1.3)}, "--attn.alpha 1.3 has no effect"),
        ({"data": DataConfig(augment="a.py")}, "--data.augment a.py takes the place of the original's flip and crop"),
        ({"attn": AttnConfig(topk=8)}, "--attn.topk 8 has no effect"),
        ({"train": TrainConfig(max_steps=40_000)}, "--train.max-steps 40000 is more than the 300 epochs, and rules"),
    ],
)
def test_each_setting_without_effect_gets_one_line(changes: dict[str, Any], words: str) -> None:
    (line,) = said(**changes)
    assert words in line
