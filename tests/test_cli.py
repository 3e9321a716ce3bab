"""The command line: presets, flags, and what a user reads after a mistake."""

from __future__ import annotations

import itertools
import os
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from detr_fabric.cli import entry_point
from detr_fabric.config import AttnConfig, Config, DataConfig, ModelConfig, TrainConfig
from detr_fabric.errors import UserError
from detr_fabric.presets import load_preset
from detr_fabric.train import parse_command, parse_train
from tests.commands import environment


def train_cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "detr_fabric.train", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})


def processor_time() -> float:
    """Seconds that the processes took that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


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


@pytest.mark.process
def test_help_takes_less_than_half_of_what_importing_torch_takes_and_explains_every_field() -> None:
    """0.7 s of processor time, where torch takes 3.4."""
    train_cli("--help")  # the first one may compile what it imports
    seconds = [processor_time()]
    done = train_cli("--help", COLUMNS="200")
    seconds.append(processor_time())
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    seconds.append(processor_time())
    assert done.returncode == 0
    for name, section in Config().to_dict().items():
        for field in section:
            assert f"--{name}.{field.replace('_', '-')}" in done.stdout
    assert seconds[1] - seconds[0] < (seconds[2] - seconds[1]) / 2


@pytest.mark.process
def test_parsing_imports_no_torch() -> None:
    code = "import sys, detr_fabric.train as t; t.parse_train(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, "--preset", "quickstart"], check=True, timeout=60)


@pytest.mark.process
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


COMMANDS = {  # with the arguments of its usage line
    "train": "",
    "evaluate": " CHECKPOINT",
    "predict": " CHECKPOINT PATH ...",
    "export": " CHECKPOINT",
    "analysis": " CHECKPOINT ...",
    "check": " [ANNOTATIONS.json]",
    "benchmark": " [PART ...]",
    "replay": " FILE",
    "report": " RUN ...",
    "study": " FILE.py",
}


@pytest.mark.process
def test_help_names_the_arguments_fits_the_terminal_and_breaks_no_sentence() -> None:
    code = f"""
import contextlib, importlib, os, sys
for command in {list(COMMANDS)}:
    module = importlib.import_module("detr_fabric." + command)
    main = getattr(module, "main", None) or importlib.import_module("detr_fabric." + command + ".__main__").main
    for columns in "80", "120":
        os.environ["COLUMNS"], sys.argv = columns, ["x", "--help"]
        with contextlib.suppress(SystemExit):
            main()
        print("END")
sys.exit("torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = iter(done.stdout.split("END\n"))
    for command, positional in COMMANDS.items():
        narrow, wide = next(texts), next(texts)
        for text, width in ((narrow, 80), (wide, 120)):
            usage = text.splitlines()[0]
            assert usage.startswith(f"usage: python -m detr_fabric.{command} [-h] ") and positional in usage
            assert max(len(line) for line in text.splitlines()[1:]) <= width
        assert letters(narrow) == letters(wide)
        # Inside the boxes a line ends early only where a sentence ends, or before a word that does not fit.
        lines = [line.strip("│ ") for line in wide.splitlines() if line.startswith("│       ")]
        for line, after in itertools.pairwise(lines):
            complete = line.endswith((".", ")", "exit")) or after.startswith("-")
            assert complete or len(line) + len(after.split()[0]) > 70, f"{command}: a hard break after {line!r}"


def letters(text: str) -> str:
    """Text without frames and spaces."""
    return "".join(re.sub("[│╭╮╰╯─]", "", text).split())


@pytest.mark.process
def test_only_rank_0_speaks() -> None:
    ranks = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert train_cli("--optim.lr", "-1", RANK="0", LOCAL_RANK="0", **ranks).stderr != ""
    silent = train_cli("--optim.lr", "-1", RANK="1", LOCAL_RANK="1", **ranks)
    assert (silent.returncode, silent.stdout, silent.stderr) == (2, "", "")


@pytest.mark.process
def test_print_config_is_a_command_that_gives_the_same_config() -> None:
    args = ["--preset", "quickstart", "--attn.kind", "sparsemax", "--data.crop", "True", "--model.dilation"]
    args += ["--model.last-stage", "layer4", "--model.freeze", "stem", "heads"]
    printed = train_cli(*args, "--print-config")
    again = shlex.split(printed.stdout.replace("\\\n", " "))[3:]
    assert parse_train(again) == parse_train(args)


@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    ["train --print-config --preset quickstart", "train --help", "evaluate --help", "analysis --help", "export --help"],
)
def test_a_reader_that_leaves_early_ends_a_command_quietly(command: str) -> None:
    """As head does; `true` reads nothing at all."""
    script = f'"$0" -m detr_fabric.{command} | true; echo "code ${{PIPESTATUS[0]}}"'
    piped = subprocess.run(["bash", "-c", script, sys.executable], env=environment(), capture_output=True, text=True)
    assert piped.stderr == "" and piped.stdout == "code 1\n"


@pytest.mark.parametrize("flag", ["model.pre-norm", "loss.aux-loss", "data.crop", "train.preflight"])
def test_a_boolean_takes_every_form_that_people_and_sweeps_write(flag: str) -> None:
    section, name = flag.replace("-", "_").split(".")
    no = f"--{section}.no-{name.replace('_', '-')}"

    def value(*args: str) -> object:
        return getattr(getattr(parse_train(["--data.root", "coco", *args]), section), name)

    for form in (["{}"], ["{}", "True"], ["{}=True"], ["{}", "true"], ["{}=true"]):
        assert value(*(part.format(f"--{flag}") for part in form)) is True
    for form in ([no], [f"--{flag}", "False"], [f"--{flag}=False"], [f"--{flag}=false"], [f"{no}=True"]):
        assert value(*form) is False
    assert value(f"--{flag}", "--optim.lr", "1e-3") is True and value(f"--{section}.{name}=false") is False


@pytest.mark.parametrize("args", [["--data.crop=maybe"], ["--data.crop", "--model.pre-norm=1"]])
def test_a_boolean_takes_nothing_else(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train(args)
    assert capsys.readouterr().err == f"error: {args[-1]}: give True or False\n"


def test_without_data_the_settings_fit_the_scenes_and_flags_win() -> None:
    config, remark = parse_command(["--model.backbone", "resnet18", "--attn.kind", "sparsemax"])
    quickstart = load_preset("quickstart").resolve()
    assert config == replace(
        quickstart,
        attn=replace(quickstart.attn, kind="sparsemax", softmax_first=0.5),
        train=replace(quickstart.train, name="r18_sparsemax"),
    )
    assert remark is not None and "quickstart" in remark and "--data.root" in remark
    own = ["--model.last-stage", "layer4", "--train.epochs", "300", "--optim.lr", "1e-4", "--model.no-pre-norm"]
    config = parse_train(own)
    assert (config.model.last_stage, config.train.epochs, config.optim.lr, config.model.pre_norm) == (
        "layer4",
        300,
        1e-4,
        False,
    )
    for args, batch in ((["--data.root", "coco"], 2), (["--preset", "r50_coco", "--data.root", "coco"], 8)):
        config, remark = parse_command(args)
        assert remark is None and replace(config.train, name=None) == TrainConfig(batch_size=batch)
    assert (
        parse_command(["--preset", "r50_coco"])[1] is None and parse_train(["--preset", "r50_coco"]).train.epochs == 300
    )


def test_a_stored_config_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="no_such_field"):
        Config.from_dict({"model": {"no_such_field": 1}})


def test_attn_alpha_has_a_range() -> None:
    with pytest.raises(ValueError, match="attn.alpha"):
        AttnConfig(alpha=4.5)


@pytest.mark.parametrize(
    ("error", "code", "said"), [(UserError("name a file"), 2, "error: name a file\n"), (KeyboardInterrupt(), 130, "")]
)
def test_a_command_ends_with_one_sentence_after_a_mistake_and_with_none_after_ctrl_c(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @entry_point()
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        command()
    assert (ended.value.code, capsys.readouterr().err) == (code, said)
