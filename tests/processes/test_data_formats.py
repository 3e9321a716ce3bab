"""Training on data in other formats, and on one annotation file that is split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from detr_fabric.config import Config, DataConfig
from detr_fabric.data.build import build_datasets, build_validation
from detr_fabric.evaluate.report import evaluate_checkpoint
from detr_fabric.evaluate.settings import Settings
from detr_fabric.runtime.rebuild import rebuild
from tests.coco_files import coco, image, thing, write_images, write_json
from tests.commands import Job
from tests.format_files import small, write_yolo


def test_data_yaml_is_a_root_to_train_on(tmp_path: Path) -> None:
    content = small()
    write_images(tmp_path / "train" / "images", content)
    write_yolo(tmp_path / "train", content)
    (tmp_path / "train" / "data.yaml").unlink()
    (tmp_path / "data.yaml").write_text("train: ../train/images\nnames: [cat, dog]\n")
    args = ["--preset", "debug", "--train.accelerator", "cpu", "--data.root", str(tmp_path / "train")]
    args += ["--data.train-images", "train/images", "--data.train-annotations", "data.yaml", "--data.scales", "64"]
    args += ["--data.val-fraction", "0.3", "--model.backbone-weights", "none", "--train.run-dir", "run"]
    job = Job(*args, "--train.batch-size", "1", cwd=tmp_path)
    assert job.wait() == [0] and "2 classes" in job.text(), job.text()


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
    rebuilt = rebuild(checkpoint)
    config = rebuilt.config
    monkeypatch.chdir(tmp_path)
    evaluate_checkpoint(rebuilt, Settings("best.ckpt", config.data, config.eval, accelerator="cpu"))
    assert capsys.readouterr().out.startswith(f"{len(val)} images, ")
    job = Job(*args, "--data.val-fraction", "0.5", "--train.epochs", "3", cwd=tmp_path)
    assert job.wait() == [2] and "--data.val-fraction was 0.25 and is now 0.5" in job.text()
