"""A checkpoint that an earlier version wrote loads, evaluates to the same scores and resumes with the same losses."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import pytest

from detr_fabric import load
from detr_fabric.data.images import read_image
from detr_fabric.evaluate.__main__ import main as evaluate
from tests.commands import REPOSITORY, Job, records

FILES = REPOSITORY / "tests" / "previous_version"  # its README says how they were made
FLAGS = (
    *("--preset", "debug", "--data.shapes-size", "32", "--data.shapes-train", "24", "--data.validate-on-train"),
    *("--data.flip", "0", "--model.backbone-weights", "backbone.pth", "--model.hidden-dim", "16", "--model.heads", "2"),
    *("--model.dec-layers", "1", "--model.num-queries", "5", "--model.dim-feedforward", "32", "--model.dropout", "0"),
    *("--attn.decoder-cross", "entmax-learned", "--optim.lr", "3e-3", "--optim.schedule", "constant"),
    *("--train.epochs", "400", "--train.log-every", "1", "--eval.every", "400", "--eval.attention-images", "0"),
)
EXPECTED = json.loads((FILES / "expected.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder that holds the run of the earlier version."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "run").mkdir()
    (folder / "run" / "last.ckpt").write_bytes(lzma.decompress((FILES / "last.ckpt.xz").read_bytes()))
    return folder


def test_it_evaluates_to_the_scores_of_its_own_version_and_detects(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(sys, "argv", ["evaluate", "run/last.ckpt", "--out", "scores.json", "--accelerator", "cpu"])
    evaluate()
    scores = json.loads((folder / "scores.json").read_text())
    assert {name: scores[name] for name in EXPECTED["saved"]} == pytest.approx(EXPECTED["saved"], abs=1e-3)

    detector = load("run/last.ckpt", "cpu")
    pictures = sorted(folder.glob("cache/**/train2017/*.jpg"))[:8]
    found = [detector(read_image(picture), threshold=0.5) for picture in pictures]
    assert len(pictures) == 8 and sum(len(each.scores) for each in found) >= 8
    assert {name for each in found for name in each.names} <= {"rectangle", "ellipse", "triangle"}


def test_it_resumes_inside_its_epoch_with_the_losses_of_its_own_version(folder: Path) -> None:
    args = (*FLAGS, "--train.run-dir", "run", "--train.max-steps", "1004")
    job = Job(*args, cwd=folder, XDG_CACHE_HOME=str(folder / "cache"))
    assert job.wait() == [0] and "resumed at step 998" in job.text(), job.text()
    losses = {str(record["step"]): record["train/loss"] for record in records(folder / "run") if "train/loss" in record}
    assert losses == pytest.approx(EXPECTED["resumed"]["losses"], rel=1e-4)
    (score,) = [record["val/AP"] for record in records(folder / "run") if "val/AP" in record]
    assert score == pytest.approx(EXPECTED["resumed"]["AP"], abs=1e-3)
