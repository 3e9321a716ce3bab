"""--train.deterministic: every switch is set before training starts, and a seed gives the same losses every time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from detr_fabric import build, loop
from detr_fabric.runtime.checkpoint import load_checkpoint
from detr_fabric.runtime.launch import make_deterministic
from tests.commands import Job, records
from tests.patching import patch
from tests.same_runs import assert_same, losses_of

ARGS = ("--preset", "debug", "--train.deterministic", "--train.log-every", "1", "--train.max-steps", "4")
FEW = ("--eval.attention-images", "0", "--data.val-limit", "2")


def print_switches() -> None:
    """Prints the switches when training starts, and whether CUDA had started when they were set."""
    launch, fit = build.make_deterministic, loop.fit

    def checked() -> None:
        print("CUDA first", torch.cuda.is_initialized())
        launch()

    def printed(run: loop.Run) -> None:
        benchmark, algorithms = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        print("switches", algorithms, warn_only, benchmark, os.environ["CUBLAS_WORKSPACE_CONFIG"], flush=True)
        fit(run)

    patch(build, "make_deterministic", checked)
    patch(loop, "fit", printed)


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_same_seed_gives_the_same_losses_bit_for_bit_whatever_the_number_of_workers(
    tmp_path: Path, accelerator: str
) -> None:
    if accelerator == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    runs = [tmp_path / workers for workers in ("0", "2")]
    for run in runs:
        args = (
            *ARGS,
            *FEW,
            "--train.accelerator",
            accelerator,
            "--data.workers",
            run.name,
            "--train.run-dir",
            str(run),
        )
        going = Job(
            *args, cwd=tmp_path, target=print_switches, XDG_CACHE_HOME=str(tmp_path), CUBLAS_WORKSPACE_CONFIG=""
        )
        assert going.wait() == [0], going.text()
        assert "CUDA first False\n" in going.text() and "switches True False False :4096:8\n" in going.text()
    logged = [[losses_of(record) for record in records(run) if "grad_norm" in record] for run in runs]
    assert len(logged[0]) == 4 and logged[0] == logged[1]
    assert_same(*({key: load_checkpoint(run / "last.ckpt")[key] for key in ("model", "optimizer")} for run in runs))


def test_a_deterministic_workspace_that_is_already_chosen_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in ((":16:8", ":16:8"), (":0:0", ":4096:8")):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
        try:
            make_deterministic()
        finally:
            torch.use_deterministic_algorithms(False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after
