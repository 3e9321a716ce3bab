"""--data.val-fraction: which images are kept for validation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from detr_fabric.config import DataConfig
from detr_fabric.data.formats.annotations import Annotations, read_annotations
from detr_fabric.data.formats.split import split
from detr_fabric.errors import UserError
from tests.coco_files import coco, image, thing, write_json


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
