"""The command line: presets, flags, and what a user reads after a mistake."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detr_fabric.cli import flags, load_preset, parse_train, preset_files
from detr_fabric.config import AttnConfig, Config, DataConfig, ModelConfig
from detr_fabric.errors import UserError
from detr_fabric.model.detr import build_model
from tests.processes import environment


def train_cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "detr_fabric.train", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})


def test_defaults_are_the_original_recipe() -> None:
    config = Config().resolve()
    original = {
        "model": dict(backbone="resnet50", dilation=False, position="sine", enc_layers=6, dec_layers=6, heads=8)
        | dict(dim_feedforward=2048, hidden_dim=256, dropout=0.1, num_queries=100, pre_norm=False),
        "loss": dict(cost_class=1, cost_bbox=5, cost_giou=2, ce_coef=1, bbox_coef=5, giou_coef=2, eos_coef=0.1)
        | dict(aux_loss=True),
        "optim": dict(lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4, lr_drop=200, clip_max_norm=0.1, schedule="step"),
        "train": dict(epochs=300, batch_size=2, accumulate=1, seed=42),
        "attn": dict(kind="softmax"),
    }
    stored = config.to_dict()
    for section, values in original.items():
        assert {name: stored[section][name] for name in values} == values
    on_coco = replace(Config(), data=DataConfig(root="coco")).resolve()
    assert on_coco.data.scales == tuple(range(480, 801, 32)) and on_coco.data.max_size == 1333 and on_coco.data.crop
    assert on_coco.model.backbone_weights == "IMAGENET1K_V1" and on_coco.model.norm == "frozen"
    assert on_coco.model.freeze == ("stem", "layer1")


def test_without_pretrained_weights_every_layer_and_norm_is_trained() -> None:
    config = replace(Config(), data=DataConfig(root="coco"), model=ModelConfig(backbone_weights="none")).resolve()
    assert config.model.norm == "batch" and config.model.freeze == ()


def test_help_answers_within_a_second_and_explains_every_field() -> None:
    train_cli("--help")  # the first one may compile what it imports
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = train_cli("--help", COLUMNS="200")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    for name, section in Config().to_dict().items():
        for field in section:
            assert f"--{name}.{field.replace('_', '-')}" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0  # torch alone takes more


def test_parsing_imports_no_torch() -> None:
    code = "import sys, detr_fabric.cli as cli; cli.parse_train(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, "--preset", "quickstart"], check=True, timeout=60)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.backbon", "resnet18"], ["--model.backbon", "--model.backbone"]),
        (["--attn.kind", "sparsmax"], ["sparsmax", "sparsemax"]),
        (["--optim.lr", "-1"], ["optim.lr", "0 or more"]),
        (["--train.batch-size", "two"], ["--train.batch-size", "two"]),
        (["--preset", "quickstar"], ["quickstar", "quickstart"]),
        (["--preset", "missing.py"], ["missing.py"]),
        (["--model.hidden-dim", "100"], ["model.hidden_dim is 100"]),
        (["--data.train-images", "x"], ["--data.train-annotations"]),
        (["rubbish"], ["rubbish"]),
    ],
)
def test_a_mistake_gets_one_message_and_exit_code_2(args: list[str], words: list[str]) -> None:
    done = train_cli(*args)
    assert done.returncode == 2
    assert all(word in done.stderr + done.stdout for word in words)
    assert "Traceback" not in done.stderr


def test_only_rank_0_speaks() -> None:
    assert train_cli("--optim.lr", "-1", RANK="0").stderr != ""
    silent = train_cli("--optim.lr", "-1", RANK="1")
    assert (silent.returncode, silent.stdout, silent.stderr) == (2, "", "")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("from detr_fabric.config import *\nconfig = Config(attn=AttnConfig(kind='sparsmax'))", "sparsmax"),
        ("from detr_fabric.config import *\nconfig = Config(optim=OptimConfig(lr=-1))", "optim.lr"),
        ("from detr_fabric.config import *\nconfig = Config(optim=OptimConfig(lrr=1))", "lrr"),
        ("config = 3", "config = Config"),
        ("config = (", "SyntaxError"),
    ],
)
def test_a_wrong_value_inside_a_preset_is_an_error(source: str, words: str, tmp_path: Path) -> None:
    preset = tmp_path / "mine.py"
    preset.write_text(source)
    done = train_cli("--preset", str(preset))
    assert done.returncode == 2 and words in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", sorted(preset_files()))
def test_preset_survives_flags_and_json_and_builds(name: str) -> None:
    config = load_preset(name)
    args = [arg for flag in flags(config) for arg in flag]
    assert parse_train(args).resolve() == replace(config, train=replace(config.train)).resolve()
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with torch.device("meta"):
        resolved = config.resolve()
        build_model(resolved.model, resolved.attn, num_classes=80, pretrained=False)


def test_print_config_is_a_command_that_gives_the_same_config() -> None:
    args = ["--preset", "quickstart", "--attn.kind", "sparsemax", "--data.crop", "True", "--model.dilation"]
    args += ["--model.last-stage", "layer4", "--model.freeze", "stem", "heads"]
    printed = train_cli(*args, "--print-config")
    again = shlex.split(printed.stdout.replace("\\\n", " "))[3:]
    assert parse_train(again) == parse_train(args)


@pytest.mark.parametrize(
    "command",
    ["train --print-config --preset quickstart", "train --help", "evaluate --help", "analysis --help", "export --help"],
)
def test_a_reader_that_leaves_early_ends_a_command_quietly(command: str) -> None:
    """As head does; `true` reads nothing at all."""
    script = f'"$0" -m detr_fabric.{command} | true; echo "code ${{PIPESTATUS[0]}}"'
    piped = subprocess.run(["bash", "-c", script, sys.executable], env=environment(), capture_output=True, text=True)
    assert piped.stderr == "" and piped.stdout == "code 1\n"


def test_every_preset_says_how_to_run_it_and_what_to_expect() -> None:
    for name, file in preset_files().items():
        text = file.read_text()
        assert f"--preset {name}" in text
        assert any(word in text for word in ("Expected", "Measured", "Compare", "AP"))


def test_a_stored_config_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="no_such_field"):
        Config.from_dict({"model": {"no_such_field": 1}})


def test_unknown_preset_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no such preset"):
        load_preset("nothing")


def test_attn_alpha_has_a_range() -> None:
    with pytest.raises(ValueError, match="attn.alpha"):
        AttnConfig(alpha=2.5)
