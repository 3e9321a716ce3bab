"""--data.val-fraction: which images are kept for validation."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coco_files import coco, image, thing, write_images, write_json
from processes import Job

from detr_fabric.checkpoint import load_checkpoint
from detr_fabric.config import Config, DataConfig
from detr_fabric.data.annotations import Annotations, read_annotations
from detr_fabric.data.loader import build_datasets, build_validation
from detr_fabric.data.split import split
from detr_fabric.errors import UserError
from detr_fabric.evaluate import Settings
from detr_fabric.scorecard import evaluate_checkpoint


def names(annotations: Annotations) -> set[str]:
    return set(annotations.file_names.tolist())


def many(tmp_path: Path, images: list[dict[str, Any]]) -> Annotations:
    things = [thing(number, entry["id"]) for number, entry in enumerate(images, 1)]
    return read_annotations(write_json(tmp_path / "many.json", coco(images, things)))


def test_a_split_has_every_image_once_and_depends_on_file_names_alone(tmp_path: Path) -> None:
    images = [image(number, file_name=f"{number}.jpg") for number in range(1, 2001)]
    train, val = split(many(tmp_path, images), 0.2)
    assert names(train) | names(val) == {entry["file_name"] for entry in images} and not names(train) & names(val)
    assert 340 < len(val) < 460  # 400 expected, with a standard deviation of 18
    assert len(train.boxes) == len(train) and len(val.boxes) == len(val)

    renumbered = [entry | {"id": 9000 - entry["id"]} for entry in images]
    random.Random(0).shuffle(renumbered)
    assert names(split(many(tmp_path, renumbered), 0.2)[1]) == names(val)
    grown = images + [image(number, file_name=f"{number}.jpg") for number in range(2001, 2101)]
    assert names(split(many(tmp_path, grown), 0.2)[1]) & names(train) == set()
    assert names(val) < names(split(many(tmp_path, images), 0.4)[1])
    assert len(val) == 404  # on every machine


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_neither_part_is_empty(fraction: float, tmp_path: Path) -> None:
    for count in (2, 3, 5):
        train, val = split(many(tmp_path, [image(number) for number in range(count)]), fraction)
        assert len(train) >= 1 and len(val) >= 1 and len(train) + len(val) == count
    with pytest.raises(UserError, match="only one image"):
        split(many(tmp_path, [image(1)]), fraction)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(root="x", val_fraction=0.0), "data.val_fraction is 0.0"),
        (dict(root="x", val_fraction=1.0), "data.val_fraction is 1.0"),
        (dict(root="x", val_fraction=0.2, val_images="y"), "without --data.val-images"),
        (dict(root="x", val_fraction=0.2, validate_on_train=True), "--data.validate-on-train"),
        (dict(val_fraction=0.2), "--data.train-images and --data.train-annotations"),
        (dict(val_fraction=0.2, train_images="x"), "--data.train-images and --data.train-annotations"),
        (dict(train_images="x", train_annotations="y"), "or --data.val-fraction for the last two"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataConfig(**settings)


def test_one_annotation_file_trains_resumes_and_evaluates_on_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [image(number) for number in range(1, 25)]
    content = coco(images, [thing(number, number, category=1 + number % 2) for number in range(1, 25)])
    write_images(tmp_path / "images", content)
    write_json(tmp_path / "all.json", content)
    data = DataConfig(
        train_images=str(tmp_path / "images"), train_annotations=str(tmp_path / "all.json"), val_fraction=0.25
    )
    resolved = replace(Config(), data=data).resolve().data
    train, val = build_datasets(resolved, seed=0)
    assert sorted(train.image_ids + val.image_ids) == list(range(1, 25)) and 0 < len(val) < 12
    assert build_validation(resolved, train.categories, seed=5).image_ids == val.image_ids
    limited = replace(resolved, train_limit=3, val_limit=2)
    assert [len(part) for part in build_datasets(limited, seed=0)] == [3, 2]

    args = ["--preset", "debug", "--train.accelerator", "cpu", "--train.run-dir", "run", "--data.val-fraction", "0.25"]
    args += ["--data.train-images", "images", "--data.train-annotations", "all.json", "--data.scales", "64"]
    args += ["--model.backbone-weights", "none"]
    for epochs in ("1", "2"):
        job = Job(*args, "--train.epochs", epochs, cwd=tmp_path)
        assert job.wait() == [0], job.text()
        assert f"{len(train)} training and {len(val)} validation images" in job.text()
        assert json.loads((tmp_path / "run" / "validation_images.json").read_text()) == val.image_ids
    checkpoint = tmp_path / "run" / "last.ckpt"
    content = load_checkpoint(checkpoint)
    config = Config.from_dict(content["config"])
    monkeypatch.chdir(tmp_path)
    evaluate_checkpoint(content, checkpoint, Settings(config.data, config.eval, accelerator="cpu"))
    assert capsys.readouterr().out.startswith(f"{len(val)} images, ")
    job = Job(*args, "--data.val-fraction", "0.5", "--train.epochs", "3", cwd=tmp_path)
    assert job.wait() == [2] and "--data.val-fraction was 0.25 and is now 0.5" in job.text()
