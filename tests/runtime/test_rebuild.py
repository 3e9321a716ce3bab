"""A model rebuilt from its file alone: ours and the original's, and files whose parts don't belong together."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fabric.config import Config, DataConfig, ModelConfig
from detr_fabric.data.formats.categories import Categories
from detr_fabric.errors import UserError
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR
from detr_fabric.runtime.checkpoint import save_checkpoint
from detr_fabric.runtime.rebuild import COCO, Rebuilt, rebuild

PETS = Categories((7, 42), ("cat", "dog"))
SMALL: dict[str, Any] = dict(backbone="resnet18", backbone_weights="none", norm="frozen", hidden_dim=32)
SMALL |= dict(enc_layers=1, dec_layers=2, dim_feedforward=48, num_queries=7)


def build(classes: int, **changes: Any) -> tuple[Config, DETR]:
    data = DataConfig(root="none", scales=(64,), max_size=100)
    config = Config(data=data, model=ModelConfig(**SMALL | changes)).resolve()
    torch.manual_seed(0)
    return config, build_model(config.model, config.attn, classes)


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A checkpoint as training writes it."""
    config, model = build(2, last_stage="layer1", heads=4)
    stored = {"model": model.state_dict(), "config": config.to_dict(), "categories": PETS.to_dict()}
    return {**stored, "state": {"step": 12}}


def saved(path: Path, content: dict[str, Any]) -> Rebuilt:
    save_checkpoint(path, content, keep_previous=False)
    return rebuild(path)


def test_a_checkpoint_of_ours_gives_its_weights_settings_classes_and_step(
    content: dict[str, Any], tmp_path: Path
) -> None:
    rebuilt = saved(tmp_path / "best.ckpt", content)
    assert rebuilt.config == Config.from_dict(content["config"]) and rebuilt.categories == PETS and rebuilt.step == 12
    assert rebuilt.path == tmp_path / "best.ckpt"
    for name, value in rebuilt.model.state_dict().items():
        assert torch.equal(value, content["model"][name]), name
    with pytest.raises(UserError, match="not dilated"):
        rebuild(rebuilt.path, dc5=True)


@pytest.mark.parametrize("dilation, dc5, arguments", [(False, False, False), (True, True, False), (True, False, True)])
def test_an_original_checkpoint_gives_the_settings_its_weights_show_and_cocos_classes(
    dilation: bool, dc5: bool, arguments: bool, tmp_path: Path
) -> None:
    config, model = build(91, dilation=dilation, pre_norm=True, heads=2 if arguments else 8)
    file = tmp_path / "detr-r18-1234abcd.pth"
    args = argparse.Namespace(nheads=2, dilation=True, lr_backbone=1e-5)
    torch.save({"model": model.state_dict(), **({"args": args, "epoch": 3} if arguments else {})}, file)
    rebuilt = rebuild(file, dc5)
    shown = ("backbone", "dilation", "heads", "hidden_dim", "enc_layers", "dec_layers", "dim_feedforward", "pre_norm")
    for name in (*shown, "num_queries", "norm", "position"):
        assert getattr(rebuilt.config.model, name) == getattr(config.model, name), name
    assert rebuilt.categories is COCO and COCO.name(18) == "dog" and COCO.id(18) == 18 and rebuilt.step is None
    assert rebuilt.config.data.scales == tuple(range(480, 801, 32)) and rebuilt.config.data.max_size == 1333
    assert rebuilt.config.train.name == "detr-r18-1234abcd"
    images, mask = torch.rand(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    with torch.no_grad():
        for mine, theirs in zip(rebuilt.model.eval()(images, mask), model.eval()(images, mask), strict=True):
            assert torch.equal(mine, theirs)


Change = Callable[[dict[str, Any]], object]
CHANGES: dict[str, Change] = {
    "no config": lambda c: c.update(config=3),
    "a section that is a list": lambda c: c["config"].update(model=[1, 2]),
    "an unknown section": lambda c: c["config"].update(optics={}),
    "an unknown setting": lambda c: c["config"]["model"].update(wings=2),
    "a setting of another type": lambda c: c["config"]["model"].update(hidden_dim="wide"),
    "no scales": lambda c: c["config"]["data"].update(scales=7),
    "an unknown backbone": lambda c: c["config"]["model"].update(backbone="vit_b_16"),
    "an unknown mapping": lambda c: c["config"]["attn"].update(kind="hardmax"),
    "a width that would fill the memory": lambda c: c["config"]["model"].update(hidden_dim=2**40),
    "queries that would fill the memory": lambda c: c["config"]["model"].update(num_queries=2**40),
    "layers without end": lambda c: c["config"]["model"].update(enc_layers=2**40),
    "classes that are a string": lambda c: c.update(categories="cat"),
    "classes without names": lambda c: c["categories"].pop("names"),
    "more names than ids": lambda c: c["categories"].update(ids=[1]),
    "class ids that are lists": lambda c: c["categories"].update(ids=[[1], [2]]),
    "class names that are numbers": lambda c: c["categories"].update(names=[1, 2]),
    "a model that is a list": lambda c: c.update(model=[torch.zeros(1)]),
    "a string among the weights": lambda c: c["model"].update({"class_embed.bias": "zero"}),
    "queries that are one number": lambda c: c["model"].update({"query_embed.weight": torch.tensor(1.0)}),
    "no queries": lambda c: c["model"].pop("query_embed.weight"),
    "another class head": lambda c: c["model"].update({"class_embed.bias": torch.zeros(9)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parts_that_do_not_belong_together_are_one_sentence(
    change: Change, content: dict[str, Any], tmp_path: Path
) -> None:
    own = {
        **content,
        "model": dict(content["model"]),
        "config": {name: dict(section) for name, section in content["config"].items()},
        "categories": dict(content["categories"]),
    }
    change(own)
    with pytest.raises(UserError, match="last.ckpt: ") as caught:
        saved(tmp_path / "last.ckpt", own)
    assert "\n" not in str(caught.value)


def test_a_state_that_says_no_step_is_no_obstacle(content: dict[str, Any], tmp_path: Path) -> None:
    for number, state in enumerate(({}, {"step": "twelve"}, "none", None)):
        assert saved(tmp_path / f"{number}.ckpt", {**content, "state": state}).step is None
