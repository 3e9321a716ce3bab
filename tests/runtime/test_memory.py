"""A training step that needs more memory than there is: one sentence with the cure, and the cure works."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fabric import loop
from detr_fabric.data.batch import MicroBatch
from detr_fabric.presets import load_preset
from detr_fabric.runtime.checkpoint import load_checkpoint
from detr_fabric.runtime.memory import advice, is_exhausted
from tests.commands import Job, steps
from tests.patching import patch

DEBUG = ("--preset", "debug", "--train.run-dir", "run", "--train.log-every", "1", "--train.checkpoint-minutes", "0")
FEW = ("--train.max-steps", "4", "--eval.attention-images", "0", "--data.val-limit", "2")


def exhaust(error: str | None) -> None:
    """The forward pass of step 3 asks for more than any machine has; or an error with these words comes up there."""
    whole = loop.training_step

    def greedy(run: loop.Run, micro_batches: list[MicroBatch]) -> loop.Step:
        def allocate(*args: Any) -> None:
            if error is not None:
                raise torch.OutOfMemoryError(error)
            torch.empty(2**50, dtype=torch.uint8, device=run.fabric.device)

        if run.state.step == 2:
            run.model.module.transformer.register_forward_hook(allocate)
        return whole(run, micro_batches)

    patch(loop, "training_step", greedy)


@pytest.mark.process
@pytest.mark.parametrize(
    ("accelerator", "error"),
    [
        ("cpu", None),  # PyTorch's own error for the CPU
        ("cpu", "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10.90 GiB"),
        pytest.param("cuda", None, marks=pytest.mark.gpu),
    ],
    ids=["cpu", "as on a GPU", "GPU"],
)
def test_exhausted_memory_is_one_sentence_and_its_advice_continues_the_run(
    tmp_path: Path, accelerator: str, error: str | None
) -> None:
    if accelerator == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    args = (*DEBUG, *FEW, "--train.accelerator", accelerator)
    going = Job(*args, cwd=tmp_path, target=partial(exhaust, error), XDG_CACHE_HOME=str(tmp_path))
    assert going.wait() == [2], going.text()
    (said,) = [line for line in going.text().splitlines() if line.startswith("error: ")]
    assert "Traceback" not in going.text()
    assert f"step 3: out of memory on {accelerator}" in said and "a batch of 8 images of 64 x 64 pixels" in said
    used, there_is = map(float, re.findall(r"([\d.]+) of ([\d.]+) GiB", said)[0])
    assert 0 <= used < there_is
    for flag in ("--train.batch-size 4 --train.accumulate 2", "--model.gradient-checkpointing", "--data.max-size"):
        assert flag in said
    cure = said.split("again with ")[1].split(" (")[0].split()
    resumed = Job(*args, *cure, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert resumed.wait() == [0], resumed.text()
    assert "resumed at step 2" in resumed.text() and steps(tmp_path / "run") == [1, 2, 3, 4]
    assert load_checkpoint(tmp_path / "run" / "last.ckpt")["global_batch"] == 8


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "memory allocation failed with OOM on device 0",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried",
        "unable to mmap 4096 bytes from file </torch_1>: Cannot allocate memory (12)",
    ],
)
def test_every_wording_of_exhausted_memory_is_recognised(words: str) -> None:
    assert is_exhausted(RuntimeError(words))


@pytest.mark.parametrize("words", ["CUDA error: device-side assert triggered", "cuDNN error: CUDNN_STATUS_BAD_PARAM"])
def test_no_other_error_of_a_gpu_is_taken_for_exhausted_memory(words: str) -> None:
    assert not is_exhausted(RuntimeError(words))


def test_the_advice_keeps_the_images_of_a_step_and_names_only_what_can_be_changed() -> None:
    cfg = load_preset("debug").resolve()
    odd = replace(cfg, train=replace(cfg.train, batch_size=9, accumulate=2))
    assert "--train.batch-size 3 --train.accumulate 6" in advice(odd)
    model, train = replace(cfg.model, gradient_checkpointing=True), replace(cfg.train, batch_size=1)
    assert advice(replace(cfg, model=model, train=train)).startswith("a --data.max-size below 128 ")
