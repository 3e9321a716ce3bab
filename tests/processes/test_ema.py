"""The moving average of the weights in whole runs: killed and resumed, on two ranks, evaluated."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fabric import loop
from detr_fabric.config import Weights
from detr_fabric.data.build import build_datasets
from detr_fabric.data.loader import EvalLoader
from detr_fabric.evaluate import __main__ as evaluate
from detr_fabric.evaluate.detect import detect
from detr_fabric.evaluate.losses import ValidationLosses
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.runtime.checkpoint import load_checkpoint
from detr_fabric.runtime.launch import single_device
from detr_fabric.runtime.rebuild import rebuild
from detr_fabric.runtime.run import Run
from tests import faults
from tests.commands import OFTEN, debug_job, exit_code, records
from tests.patching import patch
from tests.same_runs import assert_same, assert_same_run

pytestmark = pytest.mark.faults

AVERAGE = ("--optim.ema", "0.9997")


def test_a_run_with_an_average_that_is_killed_equals_one_that_was_not_and_trains_like_one_without(folder: Path) -> None:
    """Killed inside an epoch and inside the evaluation after it, where the model has the average for a while."""
    whole = debug_job(folder, "ema-whole", *AVERAGE)
    assert whole.wait() == [0], whole.text()
    assert "evaluates a moving average of the weights (decay 0.9997)" in whole.text()
    assert "evaluation of the moving average at step 16" in whole.text()
    for fault in (partial(faults.hold, 5), partial(faults.hang_in_evaluation, 8, "detected")):
        going = debug_job(folder, "ema-killed", *AVERAGE, *OFTEN, target=fault)
        going.wait_until(faults.held(folder, 5) if fault.func is faults.hold else (folder / faults.INSIDE).exists)
        going.signal(signal.SIGKILL)
        going.wait()
    for left in ("held-5", faults.INSIDE):
        (folder / left).unlink()
    assert debug_job(folder, "ema-killed", *AVERAGE).wait() == [0]
    assert_same_run(folder / "ema-killed", folder / "ema-whole")
    contents = [load_checkpoint(folder / run / "last.ckpt") for run in ("ema-whole", "whole")]
    assert_same(contents[0]["model"], contents[1]["model"])  # the average only watches
    assert "ema" not in contents[1] and not torch.equal(*(contents[0][k]["class_embed.bias"] for k in ("ema", "model")))


def keep_averages() -> None:
    """Every rank writes its average at the end of each epoch, before it is evaluated."""
    whole = loop.finish_epoch

    def finish_epoch(run: Run, *rest: Any) -> None:
        assert run.ema is not None
        torch.save(run.ema.average, f"average-{run.fabric.global_rank}.pt")
        whole(run, *rest)

    patch(loop, "finish_epoch", finish_epoch)


def test_two_ranks_have_one_average_and_evaluate_what_the_checkpoint_holds(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (*AVERAGE, "--train.batch-size", "2", "--train.accumulate", "2", "--eval.attention-images", "0")
    done = debug_job(folder, "ema-ranks", *args, "--train.epochs", "1", ranks=2, target=keep_averages)
    assert done.wait() == [0, 0], done.text()
    averages = [torch.load(folder / f"average-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same(load_checkpoint(folder / "ema-ranks" / "best.ckpt")["ema"], averages[0])
    apart = {name for name, value in averages[0].items() if not torch.equal(value, averages[1][name])}
    assert apart and all("running" in name for name in apart)  # rank 0's count: those of batch norm

    (logged,) = [record["val/loss"] for record in records(folder / "ema-ranks") if "val/AP" in record]
    assert json.loads((folder / "ema-ranks" / "evaluation.json").read_text())["weights"] == "ema"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    assert validation_loss(folder / "ema-ranks" / "best.ckpt", "ema") == pytest.approx(logged, rel=1e-5)
    assert validation_loss(folder / "ema-ranks" / "best.ckpt", "raw") != pytest.approx(logged, rel=1e-3)

    monkeypatch.chdir(folder)
    asked = ("ema-ranks/best.ckpt", "--accelerator", "cpu", "--weights", "raw", "--out", "raw.json")
    assert exit_code(monkeypatch, evaluate.main, *asked) == 0
    assert "step 8, raw weights, in" in capsys.readouterr().out
    assert json.loads((folder / "raw.json").read_text())["weights"] == "raw"


def validation_loss(checkpoint: Path, which: Weights) -> float:
    """That of a checkpoint's average or raw weights, in this process."""
    rebuilt = rebuild(checkpoint, which=which)
    losses = ValidationLosses(SetCriterion(rebuilt.categories.num_classes, rebuilt.config.loss))
    loader = EvalLoader(build_datasets(rebuilt.config.data, 42)[1], batch_size=8, data=rebuilt.config.data)
    detect(single_device("cpu", "32-true"), rebuilt.model, loader, losses.add)
    return losses.means()["loss"]
