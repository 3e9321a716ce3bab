"""--data.bad-images in whole runs: stop or skip, name, count, resume, and the same on two ranks."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from detr_fabric.data import images as image_files
from detr_fabric.errors import UserError
from detr_fabric.evaluate.report import evaluate_checkpoint
from detr_fabric.evaluate.settings import Settings
from detr_fabric.runtime.checkpoint import load_checkpoint
from detr_fabric.runtime.rebuild import rebuild
from tests import faults
from tests.coco_files import write_root
from tests.commands import Job, records
from tests.data.test_bad_images import BAD, content, damage

SMALL = ("--data.scales", "32", "--data.max-size", "64", "--data.crop", "False", "--model.backbone-weights", "none")
STEPS = 6  # two epochs of three steps of eight images


def job(folder: Path, run: str, *args: str, ranks: int = 1, last: int = STEPS) -> Job:
    """last: the step after which the run waits to be killed."""
    batch = ("--train.batch-size", str(8 // ranks), "--train.log-every", "1")
    args = ("--preset", "debug", "--data.root", "root", *SMALL, *batch, "--train.run-dir", run, *args)
    return Job(*args, cwd=folder, ranks=ranks, target=partial(without_retries, last))


def without_retries(last: int) -> None:
    """Runs in the job's process."""
    pytest.MonkeyPatch().setattr(image_files, "RETRY_SECONDS", ())
    if last < STEPS:
        faults.wait_for_a_signal(last + 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with broken images in both splits; "skip" is a run on it that nothing else happened to."""
    folder = tmp_path_factory.mktemp("user")
    root = write_root(folder / "root", content(), content(6))
    damage(root / "train2017", BAD)
    damage(root / "val2017", {0: "empty", 4: "bomb"})
    going = job(folder, "skip", "--data.bad-images", "skip")
    assert going.wait() == [0], going.text()
    (folder / "skip" / "text").write_text(going.text())
    return folder


def skipped(run: Path) -> list[tuple[int, str]]:
    """Step and file name of every image that log.jsonl calls skipped, those of a step in the order of their names."""
    found = [
        (record["step"], record["skipped"].split(":")[1].split()[0]) for record in records(run) if "skipped" in record
    ]
    return sorted((step, "/".join(Path(path).parts[-2:])) for step, path in found)


def losses(run: Path) -> list[float]:
    return [record["train/loss"] for record in records(run) if "train/loss" in record]


@pytest.mark.faults
def test_by_default_the_first_bad_image_ends_the_run_with_id_and_file(folder: Path) -> None:
    going = job(folder, "stop", "--data.workers", "2")
    assert going.wait() == [2]
    error = going.text().splitlines()[-1]
    assert error.startswith("error: image ") and error.endswith(", or set --data.bad-images skip")
    assert any(f"image {n}: root/train2017/{n}.png " in error for n in BAD) and "Traceback" not in going.text()


@pytest.mark.faults
def test_skipped_images_are_named_and_counted_and_training_goes_on(folder: Path) -> None:
    run, text = folder / "skip", (folder / "skip" / "text").read_text()
    assert len(losses(run)) == STEPS
    names = [name for _, name in skipped(run)]
    assert sorted(n for n in names if "train" in n) == sorted(2 * [f"train2017/{n}.png" for n in BAD])
    assert sorted(n for n in names if "val" in n) == sorted(2 * ["val2017/0.png", "val2017/4.png"])
    for n in BAD:
        assert text.count(f"skipped image {n}: root/train2017/{n}.png ") == 1
    *_, last = (record for record in records(run) if "train/loss" in record)
    assert last["skipped_images"] == 2 * len(BAD) and f" skipped {2 * len(BAD)} " in text
    assert f"images were skipped {2 * len(BAD)} times, named in skip/log.jsonl" in text
    assert [record["val/skipped_images"] for record in records(run) if "val/AP" in record] == [2, 2]
    assert text.count("2 unreadable images without detections") == 2


@pytest.mark.faults
def test_a_run_that_skips_resumes_bit_for_bit(folder: Path) -> None:
    args = ("--data.bad-images", "skip", "--train.checkpoint-minutes", "0", "--data.workers", "2")
    going = job(folder, "resumed", *args, last=4)
    going.wait_until(lambda: (folder / "resumed" / "log.jsonl").exists() and len(losses(folder / "resumed")) >= 2)
    going.signal(signal.SIGKILL)
    going.wait()
    assert job(folder, "resumed", "--data.bad-images", "skip").wait() == [0]
    assert losses(folder / "resumed") == losses(folder / "skip")
    assert skipped(folder / "resumed") == skipped(folder / "skip")
    states = [load_checkpoint(folder / run / "last.ckpt") for run in ("skip", "resumed")]
    assert states[0]["state"]["skipped"] == states[1]["state"]["skipped"] == 2 * len(BAD)
    assert all(torch.equal(states[0]["model"][name], value) for name, value in states[1]["model"].items())


@pytest.mark.faults
def test_two_ranks_skip_the_same_images_in_the_same_steps(folder: Path) -> None:
    going = job(folder, "two", "--data.bad-images", "skip", "--eval.attention-images", "1", ranks=2)
    assert going.wait() == [0, 0], going.text()
    assert skipped(folder / "two") == skipped(folder / "skip")
    assert f"images were skipped {2 * len(BAD)} times" in going.text()
    measured = [
        {run for record in records(folder / run) for key in record if "attention/" in key} for run in ("skip", "two")
    ]
    assert measured == [{"skip"}, set()], "attention is measured on the first image, which cannot be read"
    for n in BAD:
        assert going.text().count(f"skipped image {n}: root/train2017/{n}.png ") == 1


@pytest.mark.faults
def test_a_run_goes_on_where_its_data_were_moved_linked_and_made_read_only(folder: Path, tmp_path: Path) -> None:
    moved = write_root(tmp_path / "before", content(), content(6))
    assert job(folder, "moved", "--data.root", str(moved), "--train.max-steps", "3").wait() == [0]
    moved = moved.rename(tmp_path / "after")
    (tmp_path / "link").symlink_to(moved)
    for path in sorted(moved.rglob("*"), reverse=True):
        path.chmod(0o500 if path.is_dir() else 0o400)
    going = job(folder, "moved", "--data.root", str(tmp_path / "link"), "--data.bad-images", "skip")
    assert going.wait() == [0], going.text()
    assert "resumed at step 3" in going.text() and len(losses(folder / "moved")) == STEPS
    for path in moved.rglob("*"):
        path.chmod(0o700)


def test_evaluation_of_a_checkpoint_stops_or_counts_bad_images_without_detections(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    checkpoint = folder / "skip" / "last.ckpt"
    rebuilt = rebuild(checkpoint)
    data = replace(rebuilt.config.data, workers=0)
    evaluate_checkpoint(rebuilt, Settings("best.ckpt", data=data, accelerator="cpu"))
    text = capsys.readouterr().out
    assert "skipped image 0: root/val2017/0.png is empty" in text and "skipped image 4: " in text
    assert "6 images (2 unreadable ones without detections)" in text
    with pytest.raises(UserError, match="image 0: root/val2017/0.png is empty.* set --data.bad-images skip"):
        evaluate_checkpoint(rebuilt, Settings("best.ckpt", data=replace(data, bad_images="stop"), accelerator="cpu"))
    damage(folder / "root" / "val2017", dict.fromkeys((1, 2, 3, 5), "empty"))
    with pytest.raises(UserError, match="nor can any other image be read: check the folder root/val2017"):
        evaluate_checkpoint(rebuilt, Settings("best.ckpt", data=data, accelerator="cpu"))
