"""build_datasets: paths, flags, limits, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fabric.data.build import build_datasets, build_validation
from detr_fabric.data.transforms import EvalTransform, TrainTransform
from detr_fabric.errors import UserError
from detr_fabric.train import main
from tests.batches import resolved
from tests.coco_files import coco, image, thing, write_root


def several(count: int) -> dict[str, Any]:
    """`count` images; every second one has an object."""
    return coco([image(n) for n in range(count)], [thing(n, n) for n in range(1, count, 2)])


def test_a_root_in_cocos_layout_is_read(tmp_path: Path) -> None:
    train, val = build_datasets(resolved(root=str(write_root(tmp_path, several(6), several(4)))), seed=0)
    assert (len(train), len(val)) == (6, 4)
    assert min(val[(0, 0)][0].shape[-2:]) == 800
    assert val.transform == EvalTransform(800, 1333)
    assert isinstance(train.transform, TrainTransform) and train.transform.crop


def test_explicit_paths_override_the_root_one_by_one(tmp_path: Path) -> None:
    write_root(tmp_path / "a", several(6), several(4))
    write_root(tmp_path / "b", several(5), several(3))
    data = resolved(root=str(tmp_path / "a"), scales=(16,))
    for settings, sizes in (
        ({"train_annotations": "annotations/instances_train2017.json", "train_images": "train2017"}, (5, 4)),
        ({"val_annotations": "annotations/instances_val2017.json", "val_images": "val2017"}, (6, 3)),
    ):
        paths = {name: str(tmp_path / "b" / path) for name, path in settings.items()}
        train, val = build_datasets(replace(data, **paths), seed=0)
        assert (len(train), len(val)) == sizes
        folders = (train.folder.parent.name, val.folder.parent.name)
        assert folders == (("b", "a") if "train_images" in settings else ("a", "b"))


def test_all_four_paths_work_without_a_root(tmp_path: Path) -> None:
    write_root(tmp_path, several(6), several(4))
    data = resolved(
        train_images=str(tmp_path / "train2017"),
        val_images=str(tmp_path / "val2017"),
        train_annotations=str(tmp_path / "annotations" / "instances_train2017.json"),
        val_annotations=str(tmp_path / "annotations" / "instances_val2017.json"),
    )
    assert [len(part) for part in build_datasets(data, 0)] == [6, 4]


def test_limits_take_the_first_images_and_training_those_with_objects(tmp_path: Path) -> None:
    root = write_root(tmp_path, several(8), several(8))
    train, val = build_datasets(resolved(root=str(root), train_limit=2, val_limit=3), seed=0)
    assert train.image_ids == [1, 3]
    assert val.image_ids == [0, 1, 2]


def test_validate_on_train_evaluates_the_same_images(tmp_path: Path) -> None:
    root = write_root(tmp_path, several(8), several(2))
    train, val = build_datasets(resolved(root=str(root), train_limit=3, validate_on_train=True), seed=0)
    assert val.image_ids == train.image_ids == [1, 3, 5]
    assert isinstance(val.transform, EvalTransform)
    shutil.rmtree(root / "val2017")
    assert len(build_validation(resolved(root=str(root), validate_on_train=True), train.categories, 0)) == 8


@pytest.mark.parametrize(
    ("gone", "flag"),
    [
        ("train2017", "--data.train-images"),
        ("val2017", "--data.val-images"),
        ("annotations/instances_train2017.json", "--data.train-annotations"),
        ("annotations/instances_val2017.json", "--data.val-annotations"),
    ],
)
def test_missing_parts_name_path_and_flag(tmp_path: Path, gone: str, flag: str) -> None:
    path = write_root(tmp_path, several(2), several(2)) / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=f"{path} .*--data.root or {flag}"):
        build_datasets(resolved(root=str(tmp_path)), seed=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r"instances_train2017\.json is empty"),
        ('{"images": [1,\n}', r"instances_train2017\.json is broken JSON at line 2, column 1"),
        ('{"images": []}', r"instances_train2017\.json: its list 'images' is empty.*; 2 other problems"),
        (json.dumps(coco(None, [thing(7, 99), thing(8, 98)])), r"2 annotations name an image .* \(7, 8\)"),
    ],
)
def test_training_refuses_wrong_annotations_with_one_sentence_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    expected: str,
) -> None:
    root = write_root(tmp_path, several(2), several(2))
    (root / "annotations" / "instances_train2017.json").write_text(text)
    monkeypatch.setattr("sys.argv", ["train.py", "--preset", "debug", "--data.root", str(root)])
    with pytest.raises(SystemExit) as end:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and re.search(rf"^error: .*{expected}", line)


def test_validation_with_other_categories_is_refused(tmp_path: Path) -> None:
    val = several(2) | {"categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "cow"}]}
    val["annotations"].append(thing(99, 0, category=5))
    root = write_root(tmp_path, several(2), val)
    with pytest.raises(UserError, match=r"instances_val2017\.json: 1 annotations .* training annotations \(99\)"):
        build_datasets(resolved(root=str(root)), seed=0)


def test_a_moved_linked_and_read_only_folder_gives_the_same_samples(tmp_path: Path) -> None:
    root = write_root(tmp_path / "a", several(4), several(2))
    first = build_datasets(resolved(root=str(root)), seed=0)[0][(0, 1)]
    root.rename(tmp_path / "b")
    os.symlink(tmp_path / "b", tmp_path / "link")
    for folder in (tmp_path / "b" / "train2017", tmp_path / "b" / "annotations", tmp_path / "b"):
        folder.chmod(0o500)
    try:
        again = build_datasets(resolved(root=str(tmp_path / "link")), seed=0)[0][(0, 1)]
    finally:
        (tmp_path / "b").chmod(0o700)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].boxes, again[1].boxes)
