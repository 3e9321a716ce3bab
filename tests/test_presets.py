"""Presets: each loads, builds and says how it is run; they find each other anywhere and leave nothing behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detr_fabric.config import Config
from detr_fabric.errors import UserError
from detr_fabric.model.build import build_model
from detr_fabric.presets import flags, load_preset, preset_files
from detr_fabric.train import parse_train
from tests.commands import REPOSITORY, environment

PRESET = "from detr_fabric.config import *\n"


@pytest.mark.parametrize("name", sorted(preset_files()))
def test_preset_survives_flags_and_json_and_builds(name: str) -> None:
    config = load_preset(name)
    args = [arg for flag in flags(config) for arg in flag]
    assert parse_train(args).resolve() == replace(config, train=replace(config.train)).resolve()
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with torch.device("meta"):
        resolved = config.resolve()
        build_model(resolved.model, resolved.attn, num_classes=80, pretrained=False)


def test_the_commands_of_presets_for_coco_take_the_recipes_16_images_a_step() -> None:
    commands = {name: re.findall(r"--nproc_per_node (\d+)", file.read_text()) for name, file in preset_files().items()}
    cards = {name: int(found[0]) for name, found in commands.items() if found}
    assert len(cards) == 12
    for name, processes in cards.items():
        train = load_preset(name).train
        assert processes * train.batch_size * train.accumulate == 16, name


def test_every_preset_says_how_to_run_it_and_what_to_expect() -> None:
    for name, file in preset_files().items():
        text = file.read_text()
        assert f"--preset {name}" in text
        assert any(word in text for word in ("Expected", "Measured", "Compare", "AP"))


def test_unknown_preset_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no such preset; choose a file or one of debug, "):
        load_preset("nothing")
    with pytest.raises(UserError, match="did you mean quickstart"):
        load_preset("quikstart")
    with pytest.raises(UserError, match=r"^--preset mine\.py: no such file$"):
        load_preset("mine.py")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("from detr_fabric.config import *\nconfig = Config(attn=AttnConfig(kind='sparsmax'))", "sparsmax"),
        ("from detr_fabric.config import *\nconfig = Config(optim=OptimConfig(lr=-1))", "optim.lr"),
        ("from detr_fabric.config import *\nconfig = Config(optim=OptimConfig(lrr=1))", "lrr"),
        ("config = 3", r"config = Config"),
        ("config = (", "SyntaxError"),
    ],
)
def test_a_wrong_value_inside_a_preset_is_an_error(source: str, words: str, tmp_path: Path) -> None:
    preset = tmp_path / "mine.py"
    preset.write_text(source)
    with pytest.raises(UserError, match=words):
        load_preset(str(preset))


def test_presets_find_each_other_whatever_is_called_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_preset("r18_entmax15")
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "run_all.py").write_text("raise SystemExit('the project's own script was run')")
    (folder / "r50_coco.py").write_text("raise SystemExit('the project's own file was imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import experiments

    assert experiments.__file__ == str(folder / "__init__.py")
    assert load_preset("r18_entmax15") == expected
    assert "run_all" not in preset_files()
    assert sys.modules["experiments"] is experiments
    assert "experiments.r18_coco" not in sys.modules


@pytest.mark.parametrize("line", ["import base", "from . import base", "from experiments import base"])
def test_a_preset_file_finds_its_neighbours_and_leaves_nothing_behind(line: str, tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text(f"{PRESET}config = Config(optim=OptimConfig(lr=3e-4))")
    (tmp_path / "mine.py").write_text(
        f"from dataclasses import replace\n{PRESET}{line}\nfrom experiments import r18_coco\n"
        "config = replace(base.config, model=r18_coco.config.model)"
    )
    path, modules = sys.path.copy(), set(sys.modules)
    config = load_preset(str(tmp_path / "mine.py"))
    assert (config.optim.lr, config.model.backbone) == (3e-4, "resnet18")
    assert sys.path == path and not {"base", "mine", "experiments"} & (set(sys.modules) - modules)


def test_every_package_is_installed_and_nothing_beside_detr_fabric() -> None:
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = sorted({file.parent for file in (REPOSITORY / "detr_fabric").rglob("*.py")})
    packages = [".".join(folder.relative_to(REPOSITORY).parts) for folder in folders]
    assert sorted(setuptools["packages"]) == sorted([*packages, "detr_fabric.experiments"])
    assert setuptools["package-dir"] == {"detr_fabric.experiments": "experiments"}


@pytest.mark.process
def test_an_installed_package_has_its_presets_inside(tmp_path: Path) -> None:
    """The files as a wheel lays them: experiments/ inside the package, and a project with experiments/ of its own."""
    shutil.copytree(REPOSITORY / "detr_fabric", tmp_path / "site" / "detr_fabric")
    shutil.copytree(REPOSITORY / "experiments", tmp_path / "site" / "detr_fabric" / "experiments")
    (tmp_path / "project" / "experiments").mkdir(parents=True)
    (tmp_path / "project" / "experiments" / "__init__.py").touch()
    command = [sys.executable, "-m", "detr_fabric.train", "--preset", "r18_coco", "--data.root", "coco"]
    env = environment(PYTHONPATH=str(tmp_path / "site"))
    command.append("--print-config")
    done = subprocess.run(command, cwd=tmp_path / "project", env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--model.backbone resnet18" in done.stdout, done.stderr


@pytest.mark.process
def test_a_preset_is_a_program_in_a_checkout() -> None:
    command = [sys.executable, "-m", "experiments.r18_sparsemax", "--print-config", "--data.root", "coco"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--attn.kind sparsemax" in done.stdout, done.stderr
