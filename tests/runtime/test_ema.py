"""The moving average of the weights: its numbers, when it moves, who uses it, and what a file may hold of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from detr_fabric import load, loop
from detr_fabric.config import Config, OptimConfig
from detr_fabric.errors import UserError
from detr_fabric.runtime.checkpoint import save_checkpoint
from detr_fabric.runtime.contents import check_resumable
from detr_fabric.runtime.ema import EMA, to_evaluate
from detr_fabric.runtime.finetune import load_weights
from detr_fabric.runtime.rebuild import rebuild
from detr_fabric.runtime.resume import Checkpoint, restore_ema
from tests.checkpoints import stored
from tests.model.test_detr import small_detr
from tests.processes.test_train import small_batch
from tests.runtime.test_nonfinite import fp16_on_the_cpu
from tests.runtime.test_rebuild import PETS, build
from tests.small_runs import small_run


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def all_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# ---- numbers


def test_the_average_equals_a_slow_one_in_float64_through_warm_up_and_beyond() -> None:
    """decay 0.9 is reached at step 81, where (1 + t) / (10 + t) passes it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ema, expected = EMA(model, 0.9), {name: value.double() for name, value in model.state_dict().items()}
    for step in range(1, 121):
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.tensor(step))
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
        ema.update(step)
    assert ema.average["1.num_batches_tracked"] == 120
    for name in model.state_dict().keys() - {"1.num_batches_tracked"}:  # running statistics among them
        torch.testing.assert_close(ema.average[name].double(), expected[name], rtol=0, atol=1e-6, msg=name)


def test_the_first_steps_count_less_than_they_would_without_warm_up() -> None:
    model = nn.Linear(1, 1)
    ema = EMA(model, 0.9997)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.average["weight"].zero_()
    ema.update(1)
    assert ema.average["weight"].item() == pytest.approx(9 / 11)


def test_what_does_not_move_stays_to_the_last_bit() -> None:
    model = small_detr()
    ema, before = EMA(model, 0.9997), copied(model.state_dict())
    for step in range(1, 50):
        ema.update(step)
    assert all_equal(ema.average, before)


def test_within_the_swap_the_model_has_the_average_and_afterwards_its_own_weights_even_after_an_error() -> None:
    model = small_detr()
    ema = EMA(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    ema.update(1)
    weights, average = copied(model.state_dict()), copied(ema.average)
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), to_evaluate(ema):
        assert all_equal(model.state_dict(), average) and not all_equal(average, weights)
        raise KeyboardInterrupt
    assert all_equal(model.state_dict(), weights) and all_equal(ema.average, average)
    assert places == {name: value.data_ptr() for name, value in model.state_dict().items()}
    with to_evaluate(None):
        assert all_equal(model.state_dict(), weights)


# ---- when it moves


def step_of(run: Any) -> bool:
    """Whether an optimizer step of three micro-batches moved the average."""
    before, updates = copied(run.ema.average), []
    run.ema.update, whole = lambda step: (updates.append(step), whole(step)), run.ema.update
    loop.update(run, loop.training_step(run, small_batch()[2:5]), SimpleNamespace(dropped=lambda sentence: None))  # type: ignore[arg-type]
    run.ema.update = whole
    assert updates in ([], [run.state.step])
    assert all_equal(run.ema.average, before) != bool(updates)
    return bool(updates)


def test_it_moves_once_a_step_of_several_micro_batches_and_not_with_a_dropped_one(tmp_path: Path) -> None:
    model, run = small_run(tmp_path, Fabric(accelerator="cpu", devices=1), enc_layers=1, dec_layers=1)
    run = with_average(run, model)
    object.__setattr__(run.cfg.train, "on_nonfinite", "skip")
    assert step_of(run)
    bias = model.class_embed.bias.detach().clone()
    with torch.no_grad():
        model.class_embed.bias[0] = float("nan")
    assert not step_of(run) and run.state.dropped == 1
    with torch.no_grad():
        model.class_embed.bias.copy_(bias)
    assert step_of(run) and run.state.step == 3


def test_it_does_not_move_where_fp16s_loss_scale_overflows(tmp_path: Path) -> None:
    model, run = small_run(tmp_path, fp16_on_the_cpu(2.0**60), enc_layers=1, dec_layers=1)
    run = with_average(run, model)
    assert not step_of(run)
    run.fabric.strategy.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    assert step_of(run)


def with_average(run: Any, model: nn.Module) -> Any:
    run.ema = EMA(run.model, 0.9997)
    assert run.ema.average.keys() == model.state_dict().keys()  # the names of the file, without any wrapper's
    return run


# ---- files


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A checkpoint of a run with an average, which differs from the weights."""
    config, model = build(2, last_stage="layer1", heads=4)
    average = {name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    config = Config.from_dict(config.to_dict() | {"optim": vars(OptimConfig(ema=0.9997))})
    stored = {"model": model.state_dict(), "ema": average, "config": config.to_dict(), "categories": PETS.to_dict()}
    return {**stored, "state": {"step": 12}}


def test_a_checkpoint_gives_its_average_unless_the_raw_weights_are_asked_for(
    content: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "best.ckpt"
    save_checkpoint(path, content)
    for which, key in ((None, "ema"), ("ema", "ema"), ("raw", "model")):
        rebuilt = rebuild(path, which=which)  # type: ignore[arg-type]
        assert all_equal(rebuilt.model.state_dict(), content[key]) and rebuilt.weights == (which or "ema")
    assert all_equal(load(path, "cpu", "32-true").model.state_dict(), content["ema"])
    _, fresh = build(2, last_stage="layer1", heads=4)
    (line, *_) = load_weights(fresh, str(path), PETS)
    assert all_equal(fresh.state_dict(), content["ema"]) and line.endswith("best.ckpt (moving average)")

    del content["ema"]
    save_checkpoint(path, content)
    assert all_equal(rebuild(path).model.state_dict(), content["model"]) and rebuild(path).weights == "raw"
    with pytest.raises(UserError, match="best.ckpt: holds no moving average of weights .*leave out --weights ema"):
        rebuild(path, which="ema")


def test_an_average_that_is_none_or_fits_no_model_is_one_sentence(content: dict[str, Any], tmp_path: Path) -> None:
    path, model = tmp_path / "last.ckpt", small_detr()
    for average in (None, [1], {"a": "b"}):
        with pytest.raises(UserError, match="last.ckpt: its "):
            check_resumable({**stored(), "state": {"epoch": 0, "step": 0, "step_in_epoch": 0}, "ema": average}, path)
    ema = EMA(model, 0.9)
    before = copied(model.state_dict())
    for change in (
        lambda ema: ema.pop("class_embed.bias"),
        lambda ema: ema.update({"class_embed.bias": torch.ones(1)}),
    ):
        average = dict(model.state_dict())
        change(average)
        with pytest.raises(UserError, match="last.ckpt, its moving average: does not fit this model"):
            restore_ema(Checkpoint(path, {"ema": average}, fork=False), model, ema)
    assert all_equal(model.state_dict(), before)


def test_a_resumed_average_is_the_stored_one_and_without_any_it_starts_from_the_weights(tmp_path: Path) -> None:
    model = small_detr()
    stored_average = {
        name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    ema, before = EMA(model, 0.9), copied(model.state_dict())
    restore_ema(Checkpoint(tmp_path, {}, fork=False), model, ema)
    assert all_equal(ema.average, before)
    restore_ema(Checkpoint(tmp_path, {"ema": stored_average}, fork=False), model, ema)
    assert all_equal(ema.average, stored_average) and all_equal(model.state_dict(), before)
    restore_ema(Checkpoint(tmp_path, {"ema": stored_average}, fork=False), model, None)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, float("nan")])
def test_a_decay_outside_its_interval_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match="optim.ema is .*: a decay lies in"):
        OptimConfig(ema=decay)
