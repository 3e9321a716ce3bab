"""Runs whose micro-batches are grouped by shape or limited in size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detr_fabric.data.padding import split_batch
from detr_fabric.data.sampler import Shard, step_batches
from detr_fabric.data.transforms import TrainTransform
from tests.batches import sized
from tests.commands import Job, records

SMALL = ("--preset", "debug", "--train.log-every", "1", "--eval.attention-images", "0", "--data.val-limit", "2")
MIXED = ("--data.scales", "32", "64", "--data.max-size", "64")  # images of 32 x 32 and of 64 x 64 pixels
EXACT = ("--model.dropout", "0", "--model.norm", "frozen", "--train.max-steps", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


def trained(folder: Path, run: str, *args: str, ranks: int = 1) -> list[float]:
    """The losses of a run, step by step."""
    args = (*SMALL, *MIXED, "--train.run-dir", run, *args)
    job = Job(*args, cwd=folder, ranks=ranks, XDG_CACHE_HOME=str(folder / "cache"))
    assert job.wait() == [0] * ranks, job.text()
    assert job.text().count("padding about ") == 1
    return [record["train/loss"] for record in records(folder / run) if "train/loss" in record]


def test_ranks_with_different_numbers_of_micro_batches_train_like_one_image_at_a_time(folder: Path) -> None:
    """With this limit a micro-batch has images of one size and no padding, so the reference is one image at a time."""
    scenes = sized([(64, 64)] * 64, TrainTransform((32, 64), 64, 0.5, crop=False))
    scenes.seed = 42
    ranks = [step_batches(64, 42, 0, 4, 1, Shard(rank, 2)) for rank in (0, 1)]
    counts = [[len(split_batch([scenes.size(key) for key in step[0]], 4096)) for step in steps[:3]] for steps in ranks]
    assert counts[0] != counts[1]
    one_by_one = trained(folder, "ones", *EXACT, "--train.batch-size", "1", "--train.accumulate", "8")
    limited = ("--data.max-batch-pixels", "4096", "--train.batch-size", "4")
    two = trained(folder, "two", *EXACT, *limited, ranks=2)
    assert len(two) == 3 and two == pytest.approx(one_by_one, rel=1e-5)
    before, after = (torch.load(folder / run / "last.ckpt", weights_only=True)["model"] for run in ("ones", "two"))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=2e-5, msg=name)


def test_grouped_and_limited_batches_resume_inside_an_epoch_bit_for_bit(folder: Path) -> None:
    """With trained batch norm, whose statistics rank 0 hands to the others."""
    args = ("--data.group-by-shape", "--data.max-batch-pixels", "8192", "--train.batch-size", "4")
    whole = trained(folder, "whole", *args, "--train.max-steps", "6", ranks=2)
    cut = trained(folder, "cut", *args, "--train.max-steps", "3", ranks=2)
    again = trained(folder, "cut", *args, "--train.max-steps", "6", ranks=2)
    assert cut == whole[:3] and again == whole
