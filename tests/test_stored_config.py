"""A run's own settings as a start: its folder alone resumes it, its config.json is a preset, and every flag counts."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from detr_fabric.config import Config
from detr_fabric.presets import load_preset
from detr_fabric.train import parse_train
from tests.commands import debug_job, train

FLAGS: dict[str, tuple[str, Any]] = {  # section.field: what is typed, what it means; none is a default or debug's
    "data.root": ("mine", "mine"),
    "data.scales": ("96", (96,)),
    "data.flip": ("0.25", 0.25),
    "data.workers": ("3", 3),
    "data.bad_images": ("skip", "skip"),
    "model.backbone": ("resnet34", "resnet34"),
    "model.freeze": ("stem", ("stem",)),
    "model.num_queries": ("9", 9),
    "attn.kind": ("sparsemax", "sparsemax"),
    "attn.softmax_first": ("0.25", 0.25),
    "loss.eos_coef": ("0.2", 0.2),
    "optim.lr": ("3e-4", 3e-4),
    "optim.schedule": ("constant", "constant"),
    "train.name": ("other", "other"),
    "train.epochs": ("7", 7),
    "train.max_steps": ("5", 5),
    "train.batch_size": ("4", 4),
    "train.seed": ("1", 1),
    "train.resume": ("auto", "auto"),
    "eval.every": ("2", 2),
    "wandb.mode": ("offline", "offline"),
    "wandb.tags": ("a", ("a",)),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a run of the debug preset leaves it, with every setting of FLAGS at another value."""
    config = load_preset("debug").resolve()
    config = replace(config, train=replace(config.train, run_dir="elsewhere", resume="x", allow_config_change=True))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    return tmp_path / "run"


def test_a_folder_alone_gives_the_settings_of_its_run(run: Path) -> None:
    debug = load_preset("debug").resolve()
    own = parse_train(["--train.run-dir", str(run)])
    assert own == replace(debug, train=replace(debug.train, run_dir=str(run)))
    assert parse_train([f"--train.run_dir={run}"]) == own
    by_file = parse_train(["--train.resume", str(run / "best.ckpt"), "--train.run-dir", str(run / "new")])
    assert by_file.model == debug.model and by_file.train.run_dir == str(run / "new")
    new = parse_train(["--train.run-dir", str(run / "new"), "--data.root", "coco"])
    assert new.model == replace(Config(), data=new.data).resolve().model


def test_a_stored_config_is_a_preset_for_a_run_of_its_own(run: Path) -> None:
    config = parse_train(["--preset", str(run / "config.json"), "--optim.lr", "3e-4"])
    debug = load_preset("debug").resolve()
    assert config == replace(debug, optim=replace(debug.optim, lr=3e-4))
    assert config.train.run_dir is None and config.train.resume is None and not config.train.allow_config_change


@pytest.mark.process
@pytest.mark.parametrize("start", [["--train.run-dir", "{run}"], ["--preset", "{run}/config.json"], []])
def test_no_flag_is_overridden_by_what_it_starts_from(start: list[str], run: Path) -> None:
    typed = [part for name, (value, _) in FLAGS.items() for part in (f"--{name.replace('_', '-')}", value)]
    switches = ["--model.pre-norm", "--loss.no-aux-loss", "--data.crop", "True", "--train.deterministic"]
    config = parse_train([*(part.format(run=run) for part in start), *typed, *switches])
    for name, (_, value) in FLAGS.items():
        section, field = name.split(".")
        assert getattr(getattr(config, section), field) == value, name
        assert value != getattr(getattr(load_preset("debug").resolve(), section), field), name
    assert config.model.pre_norm and not config.loss.aux_loss and config.data.crop and config.train.deterministic
    assert not start or config.model.hidden_dim == 32  # what no flag names


def test_a_named_preset_rules_over_the_folder(run: Path) -> None:
    config = parse_train(["--preset", "overfit", "--train.run-dir", str(run)])
    overfit = load_preset("overfit").resolve()
    assert {f.name for f in fields(Config) if getattr(config, f.name) != getattr(overfit, f.name)} == {"train"}


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"mine": 1}', '{"model": {"wings": 2}}', '{"model": {"heads": "x"}}', "[" * 10**5]
)
def test_a_config_that_is_none_is_one_sentence(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    for args in (["--preset", str(file)], ["--train.run-dir", str(tmp_path)]):
        with pytest.raises(SystemExit) as ended:
            parse_train(args)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1 and str(file) in said and "--preset" in said, said


@pytest.mark.process
def test_a_run_goes_on_from_its_folder_alone(tmp_path: Path) -> None:
    first = debug_job(tmp_path, "run", "--train.max-steps", "3", "--optim.lr", "3e-4")
    assert first.wait() == [0], first.text()
    done = train(
        "--train.run-dir", "run", "--train.max-steps", "4", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache")
    )
    assert done.returncode == 0 and "resumed at step 3" in done.stdout, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optim"]["lr"] == 3e-4
