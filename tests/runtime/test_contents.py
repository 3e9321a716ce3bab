"""A checkpoint whose checksums are right and whose contents are not: it loads right or is refused in one sentence."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning_fabric.plugins.precision import MixedPrecision
from lightning_fabric.plugins.precision.precision import Precision
from torch.optim import AdamW

from detr_fabric.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.sampler import Shard
from detr_fabric.errors import UserError
from detr_fabric.evaluate import __main__ as evaluate
from detr_fabric.evaluate.settings import data_defaults
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR
from detr_fabric.optimizer import build_optimizer, build_scheduler
from detr_fabric.predict.detector import Detector
from detr_fabric.runtime.checkpoint import load_model_state, save_checkpoint
from detr_fabric.runtime.ema import EMA
from detr_fabric.runtime.finetune import load_weights
from detr_fabric.runtime.launch import single_device
from detr_fabric.runtime.rebuild import rebuild
from detr_fabric.runtime.resume import (
    as_started,
    find_checkpoint,
    fingerprint,
    restore_ema,
    restore_optimizer,
    restore_state,
)
from detr_fabric.runtime.run import State
from tests.coco_files import coco, thing, write_json

MODEL = ModelConfig(
    backbone="resnet18",
    backbone_weights="none",
    norm="frozen",
    freeze=(),
    last_stage="layer1",
    hidden_dim=16,
    heads=2,
    enc_layers=1,
    dec_layers=1,
    dim_feedforward=16,
    num_queries=4,
)
DATA = DataConfig(root="none", scales=(32,), max_size=64)


def loader(steps_per_epoch: int) -> Any:
    dataset = SimpleNamespace(augment=None)
    return SimpleNamespace(dataset=dataset, shard=Shard(0, 1), global_batch=8, steps_per_epoch=steps_per_epoch)


class Trainer:
    """A run without its loop: what setup builds, and one step of its optimizer."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        content = coco()
        content["annotations"] = [thing(1, 1), thing(2, 2, category=2)]
        self.annotations = read_annotations(write_json(folder / "annotations.json", content))
        model = ModelConfig(**{**vars(MODEL), **changes})
        self.cfg = Config(data=DATA, model=model, train=TrainConfig(allow_config_change=True)).resolve()
        self.fabric = single_device("cpu", "32-true")
        self.loader = loader(steps_per_epoch=10)

        torch.manual_seed(1)
        num_classes = self.annotations.categories.num_classes
        self.model: DETR = build_model(self.cfg.model, self.cfg.attn, num_classes, pretrained=False)
        self.model.to(memory_format=torch.channels_last)
        self.build()

    def build(self, fused: bool = True) -> None:
        """An optimizer without moments."""
        optimizer = build_optimizer(self.model, OptimConfig(), fused)
        self.scheduler = build_scheduler(optimizer, OptimConfig(), 10, 100)
        _, self.optimizer = self.fabric.setup(self.model, optimizer)
        self.ema = EMA(self.model, 0.9)

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        self.optimizer.step()

    def content(self) -> dict[str, Any]:
        """What Saver.save writes."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.average,
            "optimizer": self.optimizer.state_dict(),
            "precision": {},
            "state": vars(State(epoch=1, step=13, step_in_epoch=3, evaluated=10, window_sums=torch.ones(4))),
            "config": self.cfg.to_dict(),
            "categories": self.annotations.categories.to_dict(),
            "fingerprint": fingerprint(self.annotations),
            "world_size": 1,
            "global_batch": 8,
            "steps_per_epoch": 10,
        }

    def resume(self, path: Path) -> State:
        """As build.setup does, and a step."""
        said: list[str] = []
        found = find_checkpoint(self.cfg, path.parent, True, said)
        assert found is not None
        cfg = as_started(self.cfg, found)
        load_model_state(self.model, found.content["model"], str(path))
        state = restore_state(found, cfg, self.annotations, self.loader, said)
        restore_optimizer(found, self.fabric, self.optimizer, self.scheduler, state.epoch * 10 + state.step_in_epoch)
        restore_ema(found, self.model, self.ema)
        self.step()
        return state


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = Trainer(tmp_path_factory.mktemp("trainer"))
    return trainer


@pytest.fixture
def valid(trainer: Trainer) -> dict[str, Any]:
    """What the trainer writes after a step."""
    trainer.build()
    trainer.step()
    return copy.deepcopy(trainer.content())


def write(path: Path, content: dict[str, Any]) -> Path:
    save_checkpoint(path, content, keep_previous=False)
    return path


def detects(trainer: Trainer, path: Path) -> None:
    """What evaluate, predict and export do with a file before they come to their own work."""
    rebuilt = rebuild(path)
    data_defaults(rebuilt.config.data, DataConfig())
    detector = Detector(rebuilt.model, rebuilt.categories, rebuilt.config, trainer.fabric)
    detector.detect([detector.prepare(torch.zeros(3, 40, 60, dtype=torch.uint8))])


READERS: list[Callable[[Trainer, Path], object]] = [
    Trainer.resume,
    lambda trainer, path: load_weights(trainer.model, str(path), trainer.annotations.categories),
    detects,
]

# ---- any contents


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys that lead to every part of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*place, key)
        yield from places(part, (*place, key))


def wrong_values(old: Any) -> list[Any]:
    """What may stand in the place of a value."""
    row = torch.arange(6.0)
    tensors = [row, row.reshape(2, 3), row.int(), row > 2, row.to(torch.complex64), row.to_sparse(), row.to("meta")]
    tensors += [torch.tensor(1.5), torch.zeros(0), torch.ones(1).expand(10**12), row * torch.nan]
    if isinstance(old, torch.Tensor):
        odd = [old.double(), old.long(), old[None], old.reshape(-1)[:1], old.to("meta"), old.to_sparse()]
        odd += [old.reshape(-1)[:1].expand(old.numel()).reshape(old.shape) if old.numel() else old, old.half()]
        tensors += [*odd, *odd]
    numbers = [-1, 0, 1, 7, 2**40, 2**70, -1.5, 1e308, float("nan"), float("inf"), True]
    return [None, "", "x", "../../x", [], {}, [1], ["a"], [[1]], {"a": 1}, {1: row}, *numbers, *tensors]


def mutate(content: dict[str, Any], draw: Callable[..., Any]) -> None:
    top = draw(st.sampled_from(list(content)))
    inside = [place for place in places(content) if place[0] == top]
    *parents, key = draw(st.sampled_from(inside))
    parent = content
    for each in parents:
        parent = parent[each]
    action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
    if action == "replace":
        parent[key] = draw(st.sampled_from(wrong_values(parent[key])))
    elif isinstance(parent, list):
        parent.pop(key)
    elif action == "remove":
        del parent[key]
    else:
        parent[draw(st.sampled_from(["x", 3, "", None, f"{key}x"]))] = parent.pop(key)


def check_mutations(trainer: Trainer, folder: Path, examples: int) -> None:
    """Changes one or two values of a valid file, each time others, and reads it in every way."""
    trainer.step()
    valid = copy.deepcopy(trainer.content())

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        content = copy.deepcopy(valid)
        for _ in range(data.draw(st.integers(1, 2))):
            mutate(content, data.draw)
        path = write(folder / "last.ckpt", content)
        for reader in READERS:
            trainer.build()
            try:
                reader(trainer, path)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
                assert str(folder) in str(error) or "diverged" in str(error), str(error)

    with pytest.MonkeyPatch.context() as patched:
        for name in ("kaiming_normal_", "kaiming_uniform_"):  # a model that gets its weights from a file
            patched.setattr(torch.nn.init, name, lambda tensor, *args, **options: tensor)
        check()


@pytest.mark.process
def test_any_change_of_the_contents_loads_right_or_is_one_sentence(trainer: Trainer, tmp_path: Path) -> None:
    check_mutations(trainer, tmp_path, 40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_changes_of_the_contents_load_right_or_are_one_sentence(trainer: Trainer, tmp_path: Path) -> None:
    check_mutations(trainer, tmp_path, 250)


def test_what_was_not_changed_loads_in_every_way(trainer: Trainer, valid: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt", valid)
    for reader in READERS:
        trainer.build()
        reader(trainer, path)
    trainer.build()
    state = trainer.resume(path)
    assert (state.step, state.step_in_epoch) == (13, 3) and state.window_sums is not None


# ---- moments


def test_moments_of_another_shape_are_refused_before_anything_writes_past_their_end(
    trainer: Trainer, valid: dict[str, Any], tmp_path: Path
) -> None:
    for state in valid["optimizer"]["state"].values():
        state["exp_avg"] = torch.zeros(1)
    trainer.build()
    with pytest.raises(UserError, match=r"last.ckpt: its optimizer has a moment of torch.float32 \(1,\) for a param"):
        trainer.resume(write(tmp_path / "last.ckpt", valid))


def test_other_parts_that_are_trained_are_refused_even_if_they_are_as_many(tmp_path: Path) -> None:
    """layer2 and layer3 have as many parameters, of other shapes."""
    first = Trainer(tmp_path, last_stage="layer3", freeze=("layer2",))
    first.step()
    path = write(tmp_path / "last.ckpt", first.content())
    with pytest.raises(UserError, match="its optimizer has a moment of .*--model.freeze"):
        Trainer(tmp_path, last_stage="layer3", freeze=("layer3",)).resume(path)
    with pytest.raises(UserError, match="its optimizer is of other parts .*--model.freeze"):
        Trainer(tmp_path, last_stage="layer3", freeze=()).resume(path)


def test_moments_take_the_place_in_memory_of_their_parameter(
    trainer: Trainer, valid: dict[str, Any], tmp_path: Path
) -> None:
    """AdamW's fused kernel walks parameter and moments as if they lay alike; a file may say otherwise."""
    trainer.build()
    trainer.resume(write(tmp_path / "a" / "last.ckpt", copy.deepcopy(valid)))
    expected = [parameter.clone() for parameter in trainer.model.parameters()]
    for state in valid["optimizer"]["state"].values():
        state["exp_avg"] = state["exp_avg"].contiguous()
        state["exp_avg_sq"] = state["exp_avg_sq"].contiguous()
    trainer.build()
    trainer.resume(write(tmp_path / "b" / "last.ckpt", valid))
    for parameter, value in zip(trainer.model.parameters(), expected, strict=True):
        assert torch.equal(parameter, value)


# ---- another precision


SCALE = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 3}


def in_precision(trainer: Trainer, name: str) -> Precision:
    """Makes the trainer one of this precision, as far as a CPU can have it."""
    trainer.build(fused=name != "16-mixed")
    precision: Precision = Precision() if name == "32-true" else MixedPrecision(name, "cpu")  # type: ignore[arg-type]
    trainer.fabric = SimpleNamespace(strategy=SimpleNamespace(precision=precision))  # type: ignore[assignment]
    return precision


@pytest.mark.parametrize("before", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("now", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_precision_may_change_at_resume_in_every_direction(before: str, now: str, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.build(fused=before != "16-mixed")
    trainer.step()
    content = trainer.content() | {"precision": SCALE if before == "16-mixed" else {}}
    path = write(tmp_path / "last.ckpt", content)
    precision = in_precision(trainer, now)
    trainer.resume(path)
    for group in trainer.optimizer.param_groups:
        assert bool(group["fused"]) == (now != "16-mixed")  # PyTorch puts the step count onto the device by it
    if now == "16-mixed":
        assert precision.state_dict()["scale"] == (1024.0 if before == "16-mixed" else 65536.0)
    state = AdamW.state_dict(trainer.optimizer.optimizer)["state"][0]
    assert float(state["step"]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("before", "now"), [(False, True), (True, False)])
def test_on_a_gpu_the_step_count_lies_where_this_precision_needs_it(before: bool, now: bool, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    trainer = Trainer(tmp_path)
    trainer.fabric = single_device("cuda", "32-true")
    trainer.build(fused=before)
    trainer.step()
    path = write(tmp_path / "last.ckpt", trainer.content())
    trainer.build(fused=now)
    trainer.resume(path)
    for state in trainer.optimizer.state.values():
        assert state["step"].is_cuda == now and float(state["step"]) == 2


# ---- more data, fewer images


def test_an_epoch_that_has_become_shorter_starts_again(
    trainer: Trainer, valid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would never end: it stands after more steps than it has."""
    valid["state"]["step_in_epoch"] = 8
    path = write(tmp_path / "last.ckpt", valid)
    monkeypatch.setattr(trainer, "loader", loader(steps_per_epoch=5))
    trainer.build()
    assert trainer.resume(path).step_in_epoch == 0


# ---- where a command writes


def test_a_checkpoint_does_not_decide_where_evaluate_writes(
    trainer: Trainer, valid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    elsewhere = tmp_path / "any" / "where"
    built_in = {"root": None, "shapes_dir": str(elsewhere), "shapes_train": 3, "shapes_val": 3, "shapes_size": 32}
    valid["config"]["data"] |= built_in
    path = write(tmp_path / "best.ckpt", valid)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(path), "--accelerator", "cpu", "--data.workers", "0"])
    try:
        evaluate.main()
    except SystemExit as ended:  # its classes are others
        assert ended.code == 2
    assert not elsewhere.exists()
    (tmp_path / "mine" / "32-3-3-v1").mkdir(parents=True)
    valid["config"]["data"]["shapes_dir"] = str(tmp_path / "mine")
    assert rebuild(write(path, valid)).config.data.shapes_dir == str(tmp_path / "mine")
