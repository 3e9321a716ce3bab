"""--data.bad-images: what training and evaluation do about image files that can't be read, with real broken files."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_files import DAMAGE, coco, image, thing, write_images, write_json, write_root
from test_loader import assert_same, ids, train_loader

from detr_fabric.checkpoint import load_checkpoint
from detr_fabric.config import Config
from detr_fabric.data import images as image_files
from detr_fabric.data.annotations import read_annotations
from detr_fabric.data.coco import IN_A_ROW, CocoDetection
from detr_fabric.data.loader import EvalLoader
from detr_fabric.data.transforms import TrainTransform
from detr_fabric.errors import UserError
from detr_fabric.evaluate import Settings
from detr_fabric.scorecard import evaluate_checkpoint
from tests.processes import Job, records

IMAGES = 24
BAD = dict(zip((3, 4, 5, 11, 16, 23), DAMAGE, strict=True))  # three in a row, and the last one: the first follows it


def content(count: int = IMAGES) -> dict[str, Any]:
    return coco([image(n) for n in range(count)], [thing(n, n, category=1 + n % 2) for n in range(0, count, 2)])


def damage(folder: Path, bad: dict[int, str]) -> None:
    for number, fault in bad.items():
        DAMAGE[fault](folder / f"{number}.png")


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    folder = tmp_path_factory.mktemp("coco")
    annotations = read_annotations(write_json(folder / "instances.json", content()))
    damage(write_images(folder / "images", content()), BAD)
    transform = TrainTransform((20, 24, 28, 32), 64, 0.5, crop=True)
    return CocoDetection(folder / "images", annotations, transform, seed=7, bad_images="next")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "RETRY_SECONDS", ())


# What takes the place of an image


def test_the_next_readable_image_takes_the_place_of_each_bad_one(skipping: CocoDetection) -> None:
    for index in range(IMAGES):
        target = skipping[(2, index)][1]
        taken = index
        while taken in BAD:
            taken = (taken + 1) % IMAGES
        assert target.image_id == taken and (target.fault is None) == (index not in BAD)
        if target.fault is not None:
            assert target.fault.startswith(f"image {index}: {skipping.folder / str(index)}.png ")


def test_batches_are_the_same_for_any_workers_ranks_and_skipped_steps(skipping: CocoDetection) -> None:
    whole = list(train_loader(skipping, batch=4, accumulate=1).epoch(1))
    faults = [[t.fault for _, targets in step for t in targets] for step in whole]
    assert sum(fault is not None for step in faults for fault in step) == len(BAD)
    assert {len(step) for step in faults} == {4}
    assert_same(whole, list(train_loader(skipping, workers=2, batch=4, accumulate=1).epoch(1)))
    assert_same(whole[3:], list(train_loader(skipping, batch=4, accumulate=1).epoch(1, skip=3)))
    for batch, accumulate, world in ((2, 1, 2), (1, 2, 2), (1, 1, 4)):
        ranks = [list(train_loader(skipping, 0, batch, accumulate, rank, world).epoch(1)) for rank in range(world)]
        for step, expected in enumerate(whole):
            assert ids([rank[step] for rank in ranks]) == ids([expected])
            split = [t.fault for rank in ranks for _, targets in rank[step] for t in targets]
            assert split == faults[step]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_evaluation_a_bad_image_is_a_blank_under_its_own_id(skipping: CocoDetection, workers: int) -> None:
    blank = CocoDetection(skipping.folder, skipping.annotations, skipping.transform, 7, bad_images="blank")
    targets = [target for _, part in EvalLoader(blank, 5, 0, 1, workers, 1, False) for target in part]
    targets.sort(key=lambda target: target.image_id)
    assert [target.image_id for target in targets] == list(range(IMAGES))
    assert [number for number, target in enumerate(targets) if target.fault is not None] == list(BAD)
    assert all(len(target.labels) == 0 for target in targets if target.fault is not None)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_where_nothing_can_be_read_skipping_ends(tmp_path: Path, count: int) -> None:
    annotations = read_annotations(write_json(tmp_path / "instances.json", content(count)))
    data = CocoDetection(tmp_path / "gone", annotations, TrainTransform((20,), 64, 0, crop=False), 7, "next")
    with pytest.raises(UserError, match=f"image {count - 1}: .* does not exist.* check the folder {data.folder}"):
        data[(0, count - 1)]
    assert IN_A_ROW < 40


# Whole runs

SMALL = ("--data.scales", "32", "--data.max-size", "64", "--data.crop", "False", "--model.backbone-weights", "none")
STEPS = 6  # two epochs of three steps of eight images


def job(folder: Path, run: str, *args: str, ranks: int = 1) -> Job:
    batch = ("--train.batch-size", str(8 // ranks), "--train.log-every", "1")
    args = ("--preset", "debug", "--data.root", "root", *SMALL, *batch, "--train.run-dir", run, *args)
    return Job(*args, cwd=folder, ranks=ranks, target=without_waiting)


def without_waiting() -> None:
    """Runs in the job's process."""
    image_files.RETRY_SECONDS = ()


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
    faults = [
        (record["step"], record["skipped"].split(":")[1].split()[0]) for record in records(run) if "skipped" in record
    ]
    return sorted((step, "/".join(Path(path).parts[-2:])) for step, path in faults)


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
    going = job(
        folder, "resumed", "--data.bad-images", "skip", "--train.checkpoint-minutes", "0", "--data.workers", "2"
    )
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
    content = load_checkpoint(checkpoint)
    data = replace(Config.from_dict(content["config"]).data, workers=0)
    evaluate_checkpoint(content, checkpoint, Settings(data=data, accelerator="cpu"))
    text = capsys.readouterr().out
    assert "skipped image 0: root/val2017/0.png is empty" in text and "skipped image 4: " in text
    assert "6 images (2 unreadable ones without detections)" in text
    with pytest.raises(UserError, match="image 0: root/val2017/0.png is empty.* set --data.bad-images skip"):
        evaluate_checkpoint(content, checkpoint, Settings(data=replace(data, bad_images="stop"), accelerator="cpu"))
    damage(folder / "root" / "val2017", dict.fromkeys((1, 2, 3, 5), "empty"))
    with pytest.raises(UserError, match="nor can any other image be read: check the folder root/val2017"):
        evaluate_checkpoint(content, checkpoint, Settings(data=data, accelerator="cpu"))
