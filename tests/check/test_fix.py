"""The copy that --fix writes, and checks of validation beside training."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from detr_fabric.check.repair import repair
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.formats.categories import Categories
from tests.checking import checked, clean, found
from tests.coco_files import coco, thing, write_json, write_root


def test_the_copy_keeps_everything_that_is_not_wrong(tmp_path: Path) -> None:
    content = coco(
        None,
        [
            thing(1, 1, segmentation=[[1, 2.5, 3, 4]], note="ä"),
            thing(1, 2),
            thing(7, 2, box="x"),
            thing(3, 1, area="x"),
        ],
    )
    content["info"] = {"year": 2017, "big": 2**70, "pi": 3.141592653589793}
    source, out = write_json(tmp_path / "a.json", content), tmp_path / "out.json"
    before = source.read_bytes()
    code, report, _ = checked(source, "--fix", out)
    assert code == 0 and f"training accepts the copy {out}" in report and "training does not accept it" in report
    expected = copy.deepcopy(content)
    expected["annotations"] = [thing(1, 1, segmentation=[[1, 2.5, 3, 4]], note="ä"), thing(2, 2), thing(3, 1)]
    for row in expected["annotations"]:
        row["bbox"] = list(row["bbox"])
    assert json.loads(out.read_text()) == expected
    assert source.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["a.json", "out.json"]
    assert checked(out)[0] == 0


def test_new_annotation_ids_are_unused_and_of_the_files_kind(tmp_path: Path) -> None:
    for ids, expected in (
        ([1, 1, 2, "x", 4, 4], [1, 5, 2, 3, 4, 6]),
        (["a", "a", "1", 7, None], ["a", "4", "1", "3", "2"]),
        ([2**63, 2**63 - 1, True, [1]], [1, 2**63 - 1, 2, 3]),
    ):
        things = [thing(id, 1, box=[n, 0, 5, 5]) for n, id in enumerate(ids)]
        repaired = repair(coco(None, things))
        assert repaired.tables is not None
        assert [row["id"] for row in repaired.tables["annotations"]] == expected


@pytest.mark.parametrize("link", ["same", "symlink", "hardlink", "dotted"])
def test_the_input_is_never_overwritten(tmp_path: Path, link: str) -> None:
    source, out = write_json(tmp_path / "a.json", coco(None, [thing(1, 9)])), tmp_path / "out.json"
    before = source.read_bytes()
    if link == "same":
        out = source
    elif link == "dotted":
        out = tmp_path / "." / ".." / tmp_path.name / "a.json"
    else:
        (os.symlink if link == "symlink" else os.link)(source, out)
    code, _, error = checked(source, "--fix", out)
    assert code == 2 and "overwrite" in error and source.read_bytes() == before
    train = write_json(tmp_path / "b.json", clean())
    assert "overwrite" in checked(source, "--fix", train, "--train-annotations", train)[2]


def test_a_copy_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_json(tmp_path / "a.json", clean()), tmp_path / "out.json"
    out.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, error = checked(source, "--fix", out)
    assert code == 2 and "No space left on device" in error
    assert out.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a.json", "out.json"]


def test_both_parts_of_a_root_are_checked_and_validation_uses_the_training_categories(tmp_path: Path) -> None:
    things = [*clean()["annotations"], thing(4, 2)]
    val = coco(None, things, [{"id": 1, "name": "cat"}, {"id": 2, "name": "horse"}])
    root = write_root(tmp_path, clean(), val)
    (root / "val2017" / "1.png").write_bytes(b"")
    code, report, _ = checked("--root", root, "--workers", "1")
    train_report, val_report = report.split(f"{root}/annotations/instances_val2017.json\n")
    assert code == 1 and found(train_report) == {}
    assert found(val_report) == {
        "categories with another name than in the training annotations": ("refuses", 1, "2"),
        "annotations of a dropped category": ("refuses", 1, "2"),
        "images whose file is empty": ("stops", 1, f"1 {root}/val2017/1.png"),
        "annotations of images at which training stops": ("stops", 2, "1, 3"),
    }
    (command,) = re.findall("to write a copy that it accepts: python -m detr_fabric.check (.*)", report)
    out = tmp_path / "out.json"
    assert checked(*shlex.split(command.replace("OUT.json", str(out))), "--workers", "1")[0] == 0
    assert read_annotations(out, Categories((1, 2), ("cat", "dog"))).image_ids.tolist() == [2]
    write_json(root / "annotations" / "instances_val2017.json", clean())
    assert checked("--root", root, "--annotations-only")[0] == 0
    assert checked("--root", root, "--workers", "1")[0] == 1


def test_a_broken_training_part_does_not_hide_the_validation_part(tmp_path: Path) -> None:
    root = write_root(tmp_path, clean(), coco(None, [thing(5, 77)]))
    (root / "annotations" / "instances_train2017.json").write_text("{")
    code, report, _ = checked("--root", root, "--annotations-only")
    assert code == 1 and "broken JSON at line 1" in report
    assert found(report) == {"annotations of an unknown image": ("refuses", 1, "5")}


def test_validation_can_be_mended_to_fit_training(tmp_path: Path) -> None:
    train = write_json(tmp_path / "train.json", clean())
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "horse"}, {"id": 3, "name": "cow"}]
    val = coco(None, [thing(1, 1), thing(2, 1, category=2), thing(3, 1, category=3)], categories)
    source, out = write_json(tmp_path / "val.json", val), tmp_path / "out.json"
    assert checked(source)[0] == 0
    code, report, _ = checked(source, "--train-annotations", train, "--fix", out)
    assert code == 0 and found(report)["annotations of an unknown category"] == ("refuses", 1, "3")
    assert len(read_annotations(out, read_annotations(train).categories).boxes) == 1


def test_real_data_are_accepted(coco_mini: Path) -> None:
    code, report, _ = checked("--root", coco_mini, "--workers", "2")
    assert code == 0
    assert "80  images" in report and "79  images" in report and report.count("training accepts it\n") == 2
