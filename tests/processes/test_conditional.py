"""Conditional cross-attention, focal loss and a sparse mapping in one run: resumed bit for bit, read by commands."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest

from detr_fabric import load
from detr_fabric.analysis import __main__ as analysis
from detr_fabric.evaluate import __main__ as evaluate
from detr_fabric.predict import __main__ as predict
from detr_fabric.report import __main__ as report
from tests import faults
from tests.commands import OFTEN, debug_job, exit_code
from tests.predict.small import write_image
from tests.same_runs import assert_same_run

ARGS = (
    *("--model.cross-attention", "conditional", "--loss.kind", "focal", "--loss.cost-class", "2"),
    *("--attn.decoder-cross", "sparsemax", "--eval.topk", "12", "--train.max-steps", "8", *OFTEN),
)


@pytest.mark.faults
def test_it_is_resumed_bit_for_bit_and_every_command_reads_its_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = folder / "conditional", folder / "conditional-killed"
    first = debug_job(folder, whole.name, *ARGS)
    assert first.wait() == [0], first.text()
    assert "conditional cross-attention" in first.text()
    going = debug_job(folder, killed.name, *ARGS, target=partial(faults.hold, 5))
    going.wait_until(faults.held(folder, 5))
    going.signal(signal.SIGKILL)
    going.wait()
    resumed = debug_job(folder, killed.name, *ARGS)
    assert resumed.wait() == [0] and "resumed at step" in resumed.text(), resumed.text()
    assert_same_run(killed, whole)

    checkpoint = whole / "best.ckpt"
    scores, out = folder / "scores.json", folder / "looked-at"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    assert (
        exit_code(monkeypatch, evaluate.main, checkpoint, "--out", scores, "--confusion", "0.001", "--worst", "2") == 0
    )
    logged = json.loads((whole / "evaluation.json").read_text())
    assert json.loads(scores.read_text())["AP"] == pytest.approx(logged["AP"]) and (folder / "worst.png").exists()
    few = folder / "few.json"
    assert exit_code(monkeypatch, evaluate.main, checkpoint, "--eval.topk", "1", "--out", few) == 0
    assert json.loads(few.read_text())["AR100"] <= logged["AR100"]
    assert exit_code(monkeypatch, analysis.main, checkpoint, "--out", out, "--images", "1", "--random") == 0
    assert exit_code(monkeypatch, report.main, whole, "--out", folder / "report.html", "--scan", "8") == 0
    photo = write_image(folder / "photo.png")
    args = (checkpoint, photo, "--out", folder / "found", "--threshold", "0", "--attention")
    assert exit_code(monkeypatch, predict.main, *args) == 0
    assert len(json.loads((folder / "found" / "predictions.json").read_text())) == 12

    found = load(checkpoint, "cpu")(photo, threshold=0.0)
    assert len(found.scores) == 12 and found.queries.max() < 8
    boxes = {query: box for query, box in zip(found.queries.tolist(), found.boxes.tolist(), strict=True)}
    assert all(boxes[query] == box for query, box in zip(found.queries.tolist(), found.boxes.tolist(), strict=True))
