"""The optimizer's groups and the learning rate over a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from detr_fabric.config import AttnConfig, Config, ModelConfig, OptimConfig
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR
from detr_fabric.optimizer import build_optimizer, build_scheduler

OPTIM = OptimConfig(lr=1e-3, lr_backbone=1e-4, weight_decay=1e-2, alpha_lr_factor=10.0)


def small_detr(kind: str = "entmax-learned", freeze: tuple[str, ...] = ("stem",)) -> DETR:
    model = ModelConfig(backbone="resnet18", backbone_weights="none", hidden_dim=8, heads=2, dim_feedforward=8)
    model = replace(model, enc_layers=1, dec_layers=1, num_queries=2, last_stage="layer1", freeze=freeze)  # type: ignore[arg-type]
    return build_model(Config(model=model).resolve().model, AttnConfig(kind), 3)  # type: ignore[arg-type]


def test_every_trained_parameter_is_in_the_group_of_its_part() -> None:
    model = small_detr()
    optimizer = build_optimizer(model, OPTIM)
    group_of = {p: group["name"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(group_of)  # none twice
    for name, p in model.named_parameters():
        if name.startswith("backbone.0.body.conv1") or name.startswith("backbone.0.body.bn1"):
            assert p not in group_of, name  # frozen
        elif name.endswith("alpha_logit"):
            assert group_of[p] == "alpha", name
        else:
            assert group_of[p] == ("backbone" if name.startswith("backbone") else "transformer"), name
    assert len([name for name in group_of.values() if name == "alpha"]) == 3  # one for each attention block


def test_groups_have_the_learning_rates_and_weight_decays_of_the_config() -> None:
    found = {
        group["name"]: (group["lr"], group["weight_decay"])
        for group in build_optimizer(small_detr(), OPTIM).param_groups
    }
    assert found == {"transformer": (1e-3, 1e-2), "backbone": (1e-4, 1e-2), "alpha": (pytest.approx(1e-2), 0.0)}


def test_a_group_without_parameters_is_left_out() -> None:
    optimizer = build_optimizer(small_detr("softmax", freeze=("backbone",)), OPTIM)
    assert [group["name"] for group in optimizer.param_groups] == ["transformer"]


def test_one_kernel_updates_all_parameters_if_asked() -> None:
    model = small_detr()
    assert build_optimizer(model, OPTIM).param_groups[0]["fused"]
    assert not build_optimizer(model, OPTIM, fused=False).param_groups[0]["fused"]


def rates(optim: OptimConfig, steps: int, steps_per_epoch: int = 1) -> dict[str, list[float]]:
    """The learning rates of the groups at each step, relative to the first of the config."""
    optimizer = build_optimizer(small_detr(), optim)
    scheduler = build_scheduler(optimizer, optim, steps_per_epoch, steps)
    start = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    found: dict[str, list[float]] = {name: [] for name in start}
    for _ in range(steps):
        for group in optimizer.param_groups:
            found[group["name"]].append(group["lr"] / start[group["name"]])
        optimizer.step()
        scheduler.step()
    return found


def test_step_drops_to_a_tenth_every_lr_drop_epochs_but_not_for_alpha() -> None:
    found = rates(OptimConfig(schedule="step", lr_drop=2), steps=13, steps_per_epoch=3)
    assert found["transformer"] == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01])
    assert found["backbone"] == found["transformer"]
    assert found["alpha"] == [1.0] * 13
    found = rates(OptimConfig(schedule="step", lr_drop=2, alpha_lr_drop=True), steps=7, steps_per_epoch=3)
    assert found["alpha"] == pytest.approx([1.0] * 6 + [0.1])


def test_one_cycle_rises_to_1_and_falls_to_near_0() -> None:
    found = rates(OptimConfig(schedule="one-cycle", warmup=0.4), steps=10)
    assert found["transformer"] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    # a run shorter than its warm-up allows for starts at the top, and after its end nothing moves
    found = rates(OptimConfig(schedule="one-cycle", warmup=0.1), steps=2)
    assert found["transformer"] == [1.0, 1.0]
    scheduler = build_scheduler(build_optimizer(small_detr(), OPTIM), OptimConfig(schedule="one-cycle"), 1, 5)
    assert scheduler.lr_lambdas[0](5) == scheduler.lr_lambdas[0](9) == 0


def test_constant_stays() -> None:
    assert rates(OptimConfig(schedule="constant"), steps=5)["transformer"] == [1.0] * 5


def test_the_learning_rate_can_rise_first_under_the_step_and_constant_schedules() -> None:
    found = rates(OptimConfig(schedule="step", lr_drop=2, warmup_steps=3), steps=8, steps_per_epoch=3)
    assert found["transformer"] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1])
    assert rates(OptimConfig(schedule="constant", warmup_steps=1), steps=3)["backbone"] == [0.5, 1, 1]


def test_frozen_parameters_do_not_move() -> None:
    model = small_detr()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OPTIM)
    outputs = model.train()(torch.randn(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool))
    (outputs.pred_boxes.sum() + outputs.pred_logits.sum()).backward()
    optimizer.step()
    assert isinstance(model.query_embed, nn.Embedding) and not torch.equal(
        model.query_embed.weight, before["query_embed.weight"]
    )
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[name]), name
