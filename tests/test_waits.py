"""How often the host waits for the device in a training step."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch.profiler import ProfilerActivity, profile

from detr_fabric import loop
from detr_fabric.data.batch import MicroBatch
from detr_fabric.runtime.run import Run
from tests.processes.test_train import small_batch
from tests.small_runs import small_run


def reading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the name of each method through which the host learns what a tensor holds."""
    asked: list[str] = []

    def counted(name: str) -> None:
        whole = getattr(torch.Tensor, name)

        def ask(*args: Any) -> Any:
            asked.append(name)
            return whole(*args)

        monkeypatch.setattr(torch.Tensor, name, ask)

    for name in ("cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        counted(name)
    return asked


def steady_run(folder: Path, accelerator: str) -> tuple[Run, list[MicroBatch]]:
    """A run of a small model, and what it trains on in each step: two images, in two passes."""
    return small_run(folder, Fabric(accelerator=accelerator, devices=1))[1], small_batch()[2:4]


def test_in_each_pass_the_host_asks_for_the_costs_to_match_by_and_for_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, images = steady_run(tmp_path, "cpu")
    asked = reading(monkeypatch)
    step = loop.training_step(run, images)
    assert asked == ["cpu", "cpu", "tolist"]  # and once after the last pass: whether the gradient is finite
    assert step.finite and not step.stop_requested and not step.unreadable


def test_neither_forward_nor_backward_reads_a_number_that_a_gpu_would_have_to_be_waited_for(tmp_path: Path) -> None:
    """What the operators do inside, and the gradients that autograd writes, is seen by the profiler alone."""
    run, images = steady_run(tmp_path, "cpu")
    with profile(activities=[ProfilerActivity.CPU]) as record:
        loop.training_step(run, images)
    names = {event.key for event in record.key_averages()}
    assert "aten::convolution_backward" in names
    assert not names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}


@pytest.mark.gpu
def test_on_a_gpu_the_host_waits_once_in_each_pass_and_once_for_the_gradient(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    run, images = steady_run(tmp_path, "cuda")
    for _ in range(3):
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step = loop.training_step(run, images)
                loop.update(run, step, SimpleNamespace())  # type: ignore[arg-type]
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "synchronizing" in str(wait.message)]) == len(images) + 1
