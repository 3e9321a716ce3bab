"""The worst batch is tried before the first step: it leaves no trace, and where it does not fit, what fits is named."""

from __future__ import annotations

import mmap
import os
import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric

from detr_fabric.config import COCO_SCALES, DataConfig
from detr_fabric.data.padding import pixels
from detr_fabric.data.transforms import TrainTransform
from detr_fabric.errors import UserError
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR
from detr_fabric.optimizer import build_optimizer
from detr_fabric.presets import load_preset
from detr_fabric.runtime import preflight as module
from detr_fabric.runtime.memory import free_memory, peak_memory, reset_peak_memory, whole_memory
from detr_fabric.runtime.preflight import BatchSize, most, preflight, rehearse, worst_batches
from tests.commands import Job, records
from tests.patching import patch

SMALL = ("--preset", "debug", "--train.log-every", "1", "--train.max-steps", "3", "--eval.attention-images", "0")
COCO = DataConfig(root="coco", scales=COCO_SCALES, max_size=1333, crop=False)
Pair = tuple[int, int]


def job(folder: Path, run: str, *args: str, ranks: int = 1, target: Any = None) -> Job:
    args = (*SMALL, "--data.val-limit", "2", "--train.batch-size", "4", "--train.run-dir", run, *args)
    return Job(*args, cwd=folder, ranks=ranks, target=target, XDG_CACHE_HOME=str(folder / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


# ---- the worst batch


@pytest.mark.parametrize(
    ("data", "batch", "sizes", "expected"),
    [
        (COCO, 1, [(480, 640)], [(1, 800, 1066)]),
        (COCO, 4, [(480, 640), (640, 480), (100, 400)], [(4, 1066, 1332)]),
        (COCO, 4, [(480, 640), (0, 0)], [(4, 1333, 1333)]),
        (replace(COCO, crop=True), 2, [(500, 500)], [(2, 1250, 1250)]),
        (replace(COCO, pad_multiple=32), 2, [(480, 640)], [(2, 800, 1088)]),
        (replace(COCO, max_batch_pixels=2_000_000), 2, [(480, 640)], [(2, 800, 1066)]),
        (replace(COCO, max_batch_pixels=2_000_000), 4, [(480, 640)], [(2, 800, 1066), (3, 707, 942)]),
        (replace(COCO, max_batch_pixels=1_100_000), 4, [(0, 0)], [(1, 1333, 800), (2, 741, 741)]),
    ],
    ids=["alone", "flat and upright", "unknown", "cropped", "multiple", "below the limit", "limited", "one by one"],
)
def test_the_worst_batch_follows_from_settings_and_sizes(
    data: DataConfig, batch: int, sizes: list[Pair], expected: list[tuple[int, int, int]]
) -> None:
    assert worst_batches(data, batch, np.array(sizes)) == [BatchSize(*each) for each in expected]


@settings(max_examples=60, deadline=None)
@example([(30, 32), (36, 66)], 1, False, 16)  # rounding up to a multiple changes which shape is the largest
@given(
    st.lists(st.tuples(st.integers(30, 300), st.integers(30, 300)), min_size=1, max_size=6),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([1, 16]),
)
def test_no_batch_is_larger_than_the_worst(sizes: list[Pair], batch: int, crop: bool, multiple: int) -> None:
    data = DataConfig(root="x", scales=(400, 500), max_size=700, crop=crop, pad_multiple=multiple)
    transform = TrainTransform((400, 500), 700, 0.5, crop)
    (worst,) = worst_batches(data, batch, np.array(sizes))
    rng = random.Random(0)
    for _ in range(40):
        shapes = [transform.plan(*rng.choice(sizes), rng).size for _ in range(batch)]
        assert pixels(shapes, multiple) <= worst.images * worst.height * worst.width


@given(st.integers(0, 70), st.integers(0, 70))
def test_bisection_finds_the_largest_that_fits(limit: int, truth: int) -> None:
    asked = []
    assert most(limit, lambda number: asked.append(number) or number <= truth) == min(limit, truth)
    assert len(asked) <= 7 and all(1 <= number <= limit for number in asked)


# ---- no trace


@pytest.mark.process
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_losses_and_weights_are_the_same_bit_for_bit_with_and_without(folder: Path, ranks: int) -> None:
    """With dropout, trained batch norm, and steps of several passes; three ranks also settle DDP's order."""
    args = ("--train.accumulate", "2", "--data.scales", "48", "64")
    found = []
    for answer in ("True", "False"):
        run = f"{ranks}_{answer}"
        going = job(folder, run, *args, "--train.preflight", answer, ranks=ranks)
        assert going.wait() == [0] * ranks, going.text()
        assert ("4 images of 64 x 64 pixels with 8 objects each fit" in going.text()) == (answer == "True")
        weights = torch.load(folder / run / "last.ckpt", weights_only=True)["model"]
        losses = [record["train/loss"] for record in records(folder / run) if "train/loss" in record]
        found.append((losses, weights))
    (losses, weights), (losses_without, weights_without) = found
    assert losses == losses_without and len(losses) == 3
    assert all(torch.equal(value, weights_without[name]) for name, value in weights.items())


def prepared(**changes: Any) -> Any:
    """What preflight needs of a run, on scenes of 64 pixels."""
    cfg = load_preset("debug").resolve()
    cfg = replace(cfg, train=replace(cfg.train, **changes))
    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    model = build_model(cfg.model, cfg.attn, 3)
    wrapped, optimizer = fabric.setup(model, build_optimizer(model, cfg.optim))
    dataset = SimpleNamespace(annotations=SimpleNamespace(sizes=np.array([(64, 64)])))
    return SimpleNamespace(
        cfg=cfg,
        fabric=fabric,
        model=wrapped,
        criterion=SetCriterion(3),
        optimizer=optimizer,
        train_loader=SimpleNamespace(dataset=dataset),
    )


def test_model_optimizer_and_generators_are_as_before() -> None:
    run = prepared(accumulate=2)
    model, optimizer = run.model, run.optimizer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    seen = []
    model.module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    preflight(run)
    assert seen == [(8, 3, 64, 64)] * 2  # the second pass of a step also has the gradients of the first
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not optimizer.state_dict()["state"]
    assert model.training


def test_other_errors_are_not_taken_for_exhausted_memory() -> None:
    run = prepared()

    def fail(*args: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    run.model.module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        rehearse(run, BatchSize(1, 32, 32))


# ---- too large


def room_for(images: list[int]) -> None:
    """Rank r can hold a batch of so many images; the machine's own words come up beyond."""
    limit = images[int(os.environ.get("RANK", 0))]
    forward = DETR.forward

    def limited(self: DETR, pictures: torch.Tensor, mask: torch.Tensor) -> Any:
        if len(pictures) > limit and pictures.shape[-1] == 64:
            torch.empty(2**50, dtype=torch.uint8)
        return forward(self, pictures, mask)

    patch(DETR, "forward", limited)


@pytest.mark.process
@pytest.mark.parametrize(
    ("room", "what", "cure"),
    [
        ([3], "3 images of 64 x 64 pixels would fit", "--train.batch-size 2 --train.accumulate 2"),
        ([4, 1], "1 image of 64 x 64 pixels would fit", "--train.batch-size 1 --train.accumulate 4"),
        ([0], "not even one image fits", "--model.gradient-checkpointing"),
    ],
    ids=["one rank", "one of two ranks", "none fits"],
)
def test_what_does_not_fit_ends_with_one_sentence_and_its_cure_trains(
    folder: Path, room: list[int], what: str, cure: str
) -> None:
    ranks, run = len(room), f"room{sum(room)}"
    args = ("--train.preflight", "True", "--data.max-size", "64")
    going = job(folder, run, *args, ranks=ranks, target=partial(room_for, room))
    assert going.wait() == [2] * ranks, going.text()
    assert "Traceback" not in going.text()
    (said,) = [line for line in going.text().splitlines() if line.startswith("error: ")]
    assert "a batch of 4 images of 64 x 64 pixels with 8 objects each" in said and what in said
    assert f": set {cure} (" in said and "--model.gradient-checkpointing (" in said
    assert not (folder / run / "last.ckpt").exists()
    if room == [3]:
        limit = "--data.max-batch-pixels 12288"
        assert limit in said
        for number, change in enumerate((cure, limit)):
            again = job(folder, f"cured{number}", *args, *change.split(), target=partial(room_for, room))
            assert again.wait() == [0], again.text()


def test_on_a_cpu_a_batch_that_its_images_foretell_to_be_too_large_is_refused_untried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system would kill the process instead of raising an error."""
    run = prepared(preflight=True)
    seen = []
    run.model.module.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    monkeypatch.setattr(module, "FORESEEN_PIXELS", 0)
    peaks = iter(float(value) for value in range(1000))  # each image takes a GiB more than before
    monkeypatch.setattr(module, "peak_memory", lambda device: next(peaks))
    monkeypatch.setattr(module, "free_memory", lambda: 3.5)
    with pytest.raises(UserError, match="a batch of 8 images of 64 x 64 .* 3 images of 64 x 64 pixels would fit"):
        preflight(run)
    assert max(seen) == 3


def test_what_the_largest_batch_takes_on_a_cpu_is_measured() -> None:
    line = preflight(prepared())
    took, rest, whole = map(
        float, re.findall(r"takes ([\d.]+) GiB beside this process's ([\d.]+), of the ([\d.]+)", line)[0]
    )
    assert 0 <= took < 1 and 0 < rest < whole


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system never forgets a peak")
def test_the_most_memory_used_can_be_counted_anew() -> None:
    cpu = torch.device("cpu")
    with mmap.mmap(-1, 100 << 20) as block:  # goes back to the system at the end, which a freed tensor need not
        block.write(bytes(100 << 20))
        high = peak_memory(cpu)
    reset_peak_memory(cpu)
    assert peak_memory(cpu) <= high - 0.05
    assert 0 < free_memory() < whole_memory(cpu)


# ---- a GPU


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


def little_memory() -> None:
    """One GiB of the GPU, whatever it has."""
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / whole, 0)


@pytest.mark.process
@pytest.mark.gpu
def test_on_a_gpu_too_much_is_refused_and_the_cure_trains_below_the_measured_peak(
    cuda: torch.device, tmp_path: Path
) -> None:
    """Unset, a GPU is tried. 1,024 images take far more than the GiB that there is."""
    args = ("--train.accelerator", "cuda", "--train.precision", "32-true", "--data.shapes-train", "1024")
    going = job(tmp_path, "large", *args, "--train.batch-size", "1024", target=little_memory)
    assert going.wait() == [2] and "Traceback" not in going.text(), going.text()
    (said,) = [line for line in going.text().splitlines() if line.startswith("error: ")]
    assert "does not fit into the" in said and "GiB of cuda:0" in said
    cure = said.split(": set ")[1].split(" (")[0].split()
    again = job(tmp_path, "cured", *args, "--train.batch-size", "1024", *cure, target=little_memory)
    assert again.wait() == [0], again.text()
    peak = float(again.text().split("memory  at most ")[1].split()[0])
    used = [record["memory_gb"] for record in records(tmp_path / "cured") if "memory_gb" in record]
    assert 0 < used[0] <= peak + 0.1  # a figure with one digit
