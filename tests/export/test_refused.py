"""An export that finds something else than the model is not written, and mistakes end in one sentence."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detr_fabric import load
from detr_fabric.analysis.capture import unwrap
from detr_fabric.export import __main__ as export
from detr_fabric.export import trial, verified
from detr_fabric.export.graph import Portable
from detr_fabric.runtime.checkpoint import save_checkpoint
from tests.commands import REPOSITORY, python
from tests.export.small import (
    run,
    write_checkpoint,
)
from tests.patching import Patch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def stand_in(patch: Patch, change: Change) -> None:
    """Replaces what takes long: the program is the model itself, whose answers are changed."""
    models: list[Portable] = []
    patch(verified, "to_program", lambda model, limits: models.append(Portable(copy.deepcopy(model))))
    patch(verified, "save_torch", lambda program, path: path.write_text("new"))
    patch(verified, "open_torch", lambda path: lambda *batch: change(*models[-1](*batch)))


@torch.no_grad()
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda scores, labels, boxes: (scores, labels, boxes + 2e-4), "2.0e-04 off"),
        (lambda scores, labels, boxes: (scores * 0.99, labels, boxes), "off the model's"),
        (lambda scores, labels, boxes: (scores, 1 - labels, boxes), "off the model's"),
        (lambda scores, labels, boxes: (scores, labels, boxes * torch.nan), "inf off"),
        (lambda scores, labels, boxes: (scores, labels, boxes + 2e-5), None),
    ],
)
def test_a_file_whose_answers_differ_is_not_written(
    change: Change,
    words: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    patch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in(patch, change)
    file = write_checkpoint(tmp_path / "best.ckpt")
    (tmp_path / "best.pt2").write_text("old")
    code = run(monkeypatch, file, "--format", "torch")
    names = {path.name for path in tmp_path.iterdir()}
    if words is None:
        assert code == 0 and (tmp_path / "best.pt2").read_text() == "new"
        assert names == {"best.ckpt", "best.pt2", "best.pt2.json"}
    else:
        assert code == 2 and (tmp_path / "best.pt2").read_text() == "old" and names == {"best.ckpt", "best.pt2"}
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert "best.pt2 is not written" in line and words in line


@torch.no_grad()
def test_a_label_may_differ_between_classes_that_score_alike_and_is_counted(tmp_path: Path) -> None:
    model = unwrap(load(write_checkpoint(tmp_path / "best.ckpt"), "cpu").model)
    model.class_embed.weight[1] = model.class_embed.weight[0]
    model.class_embed.bias[1] = model.class_embed.bias[0]
    portable = Portable(copy.deepcopy(model))

    def other(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, labels, boxes = portable(images, mask)
        return scores, 1 - labels, boxes

    found = trial.difference(model, other, trial.trial_batches([torch.zeros(3, 64, 64, dtype=torch.uint8)]))
    assert found.largest <= 1e-6 and found.labels == 2 * 7  # alone, and in a batch


# Mistakes


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["nothing.ckpt"], "nothing.ckpt: no such file"),
        (["notes.txt"], "notes.txt: can't be read as a checkpoint"),
        (["best.ckpt", "--out", "/dev/null/x.onnx"], "--out /dev/null/x.onnx: .*give a file elsewhere"),
        (["best.ckpt", "--out", "."], "--out .: it is a folder"),
        (["best.ckpt", "--images", "nothing"], "nothing: no such file or folder"),
        (["best.ckpt", "--dc5"], "not dilated"),
        (["best.ckpt", "--data.root", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_in_one_sentence_and_leave_no_file(
    args: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "best.ckpt")
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert run(monkeypatch, *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{sentence}", line), line
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "notes.txt"}


def test_missing_packages_are_named_with_the_command_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    patch(export, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    assert run(monkeypatch, write_checkpoint(tmp_path / "best.ckpt")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install onnx onnxscript onnxruntime" in line and "--format torch" in line


def test_weights_that_have_diverged_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(patch, lambda *answers: answers)
    file = write_checkpoint(tmp_path / "best.ckpt")
    content = torch.load(file, weights_only=True)
    content["model"]["class_embed.bias"].fill_(torch.nan)
    save_checkpoint(Path(file), content, keep_previous=False)
    assert run(monkeypatch, file, "--format", "torch") == 2
    assert "not finite" in capsys.readouterr().err


def test_the_command_line_writes_a_program_that_needs_nothing_of_the_package(tmp_path: Path) -> None:
    shown = python("-m", "detr_fabric.export", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "--format" in shown.stdout
    file = write_checkpoint(tmp_path / "best.ckpt", last_stage="layer2")
    done = python("-m", "detr_fabric.export", file, "--format", "torch", "--out", "a/b.pt2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = (tmp_path / "a" / "b.pt2").read_bytes()
    assert str(REPOSITORY).encode() not in content
    graph = torch.export.load(tmp_path / "a" / "b.pt2").graph_module
    targets = {
        str(node.target) for m in graph.modules() if isinstance(m, torch.fx.GraphModule) for node in m.graph.nodes
    }
    assert not any("detr_fabric" in target for target in targets)
