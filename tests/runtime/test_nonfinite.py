"""What is not finite is found, and an overflow of fp16's loss scale is told from it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import nn

from detr_fabric import loop
from detr_fabric.config import AttnConfig, Config, Mapping, ModelConfig
from detr_fabric.data.batch import MicroBatch
from detr_fabric.errors import EveryRankError
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR
from detr_fabric.runtime import nonfinite
from detr_fabric.runtime.checkpoint import read_torch_file
from detr_fabric.runtime.nonfinite import REPLAY_FILE, examine
from detr_fabric.runtime.run import Run, Step
from tests.model.test_detr import SMALL, small_detr
from tests.processes.test_train import small_batch
from tests.same_runs import assert_same
from tests.small_runs import small_run

LAYER = "transformer.decoder.layers.0"


def fp16_on_the_cpu(scale: float) -> Fabric:
    """fp16 with a loss scale on a CPU, which Fabric's own choice of plugins leaves to GPUs."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))


def step_in_fp16(folder: Path, scale: float) -> tuple[DETR, Run]:
    """A model, and what a training step needs."""
    return small_run(folder, fp16_on_the_cpu(scale), enc_layers=1, dec_layers=1)  # fp16 is slow on a CPU


def take_step(run: Run) -> tuple[Step, bool]:
    """A step on one image, and whether it was dropped."""
    before = run.state.dropped
    step = loop.training_step(run, small_batch()[3:4])
    loop.update(run, step, SimpleNamespace(dropped=lambda sentence: None))  # type: ignore[arg-type]
    return step, run.state.dropped > before


def test_an_overflow_of_the_loss_scale_is_normal_but_a_loss_or_gradient_that_is_not_finite_is_not(
    tmp_path: Path,
) -> None:
    model, run = step_in_fp16(tmp_path, scale=2.0**60)
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):
        step, dropped = take_step(run)
        assert step.losses.total.isfinite() and not step.grad_norm.isfinite() and not dropped
    assert run.fabric.strategy.precision.scaler.get_scale() == 2.0**58 and run.state.dropped == 0
    assert all(map(torch.equal, before, model.parameters())) and not list(tmp_path.iterdir())
    run.fabric.strategy.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    step, _ = take_step(run)
    assert step.grad_norm.isfinite() and not all(map(torch.equal, before, model.parameters()))

    with torch.no_grad():
        model.class_embed.bias[0] = float("nan")
    with pytest.raises(EveryRankError, match="first the output of class_embed, whose bias is not finite"):
        take_step(run)


def test_a_gradient_that_overflows_without_any_loss_scale_stops_fp16_too(tmp_path: Path) -> None:
    model, run = step_in_fp16(tmp_path, scale=1.0)
    model.class_embed.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(EveryRankError, match="the gradient is not finite, first the gradient of class_embed.bias"):
        take_step(run)
    assert read_torch_file(tmp_path / REPLAY_FILE)["precision"] == "16-mixed"


def test_a_step_dropped_in_fp16_changes_no_weight_and_the_next_one_is_taken(tmp_path: Path) -> None:
    model, run = step_in_fp16(tmp_path, scale=2.0)
    object.__setattr__(run.cfg.train, "on_nonfinite", "skip")
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        model.class_embed.bias[0] = float("nan")
    _, dropped = take_step(run)
    assert dropped and (run.state.dropped, run.state.dropped_in_a_row) == (1, 1)
    with torch.no_grad():
        model.class_embed.bias.copy_(dict(zip(dict(model.named_parameters()), before, strict=True))["class_embed.bias"])
    assert all(map(torch.equal, before, model.parameters()))
    assert not take_step(run)[1] and run.state.dropped_in_a_row == 0
    assert not all(map(torch.equal, before, model.parameters()))


# ---- the search for the first bad place


def examined(model: nn.Module, micro_batches: list[MicroBatch] | None = None) -> nonfinite.Findings:
    fabric = Fabric(accelerator="cpu", devices=1)
    batches = micro_batches or small_batch()[2:5]
    return examine(fabric, model.train(), SetCriterion(5), batches, torch.tensor([6.0, 90.0]), seed=1)


@pytest.mark.parametrize("kind", ["softmax", "sparsemax", "entmax-learned", "topk"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_a_healthy_step_nothing_is_found_and_nothing_moves(kind: Mapping, checkpointing: bool) -> None:
    parts = ModelConfig("resnet18", "none", norm="batch", gradient_checkpointing=checkpointing, **SMALL)
    model = build_model(replace(Config(), model=parts).resolve().model, AttnConfig(kind), 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = examined(model)
    assert found.place is None and found.image_ids == [2, 3, 4] and all(map(math.isfinite, found.losses.values()))
    assert_same({**model.state_dict()}, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_images_of_the_accumulated_batch_that_went_wrong_are_named_alone() -> None:
    batches = small_batch()[2:5]
    batches[1][1][0].boxes[0, 2] = float("nan")
    found = examined(small_detr(), batches)
    assert found.place == "the total loss" and found.image_ids == [3]
    assert {name for name, value in found.losses.items() if not math.isfinite(value)} > {"loss_bbox", "loss_giou_0"}
    assert all(math.isfinite(value) for name, value in found.losses.items() if name.startswith("loss_ce"))


def test_the_gradient_of_an_output_is_named_where_it_first_goes_wrong() -> None:
    class Spoiled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            out.register_hook(lambda gradient: gradient * float("nan"))
            return out * 1

    model = small_detr()
    layer = model.transformer.decoder.layers[1]
    spoiled = Spoiled(layer.linear1.in_features, layer.linear1.out_features)
    spoiled.load_state_dict(layer.linear1.state_dict())
    layer.linear1 = spoiled
    place = examined(model).place
    assert place is not None and place.startswith("the gradient of transformer.decoder.layers.1.linear1.")
