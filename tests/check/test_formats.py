"""The check of Pascal VOC and YOLO data: copies as COCO JSON that COCO tools accept, and data without objects."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_fabric.config import Config, DataConfig
from detr_fabric.data.build import build_datasets
from detr_fabric.data.formats.annotations import read_annotations
from tests.checking import checked
from tests.coco_files import coco, image, thing, write_images, write_json
from tests.format_files import objects, small, write_voc, write_yolo


def score_by_pycocotools(file: Path) -> float:
    """AP of perfect detections, which pycocotools reads from the file itself."""
    rows = json.loads(file.read_text())["annotations"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        evaluation = COCOeval(truth, truth.loadRes([row | {"score": 1.0} for row in rows]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_a_copy_of_another_format_is_accepted_by_coco_tools(kind: str, tmp_path: Path) -> None:
    content = small()
    write_images(tmp_path / "images", content)
    if kind == "voc":
        source = write_voc(tmp_path / "Annotations", content)
    else:
        source = write_yolo(tmp_path, content) / "data.yaml"
    out = tmp_path / "out.json"
    args = (source, "--images", tmp_path / "images", "--workers", "1")
    code, report, _ = checked(*args, "--fix", out)
    assert code == 0 and "training accepts the copy" in report, report
    copied = json.loads(out.read_text())
    assert [row["id"] for row in copied["images"]] == [1, 2, 3, 4]
    assert [row["id"] for row in copied["annotations"]] == [1, 2, 3, 4]
    assert [row["id"] for row in copied["categories"]] == ([1, 2] if kind == "voc" else [0, 1])
    assert np.allclose([row["area"] for row in copied["annotations"]], [200, 1200, 200, 1])
    assert score_by_pycocotools(out) == pytest.approx(1)
    assert objects(read_annotations(out)) == objects(read_annotations(source, images=tmp_path / "images"))

    val = tmp_path / "val.json"  # which fits the training data as they are, and their copy
    for training in (source, out):
        assert checked(*args, "--train-annotations", training, "--fix", val)[0] == (0 if kind == "voc" else code), (
            training
        )
        categories = read_annotations(training, images=tmp_path / "images").categories
        assert objects(read_annotations(val, categories)) == objects(read_annotations(out))


@pytest.mark.parametrize(
    "things",
    [
        [],
        [thing(1, 1, iscrowd=1), thing(2, 2, iscrowd=1)],
        [thing(1, 1, box=[50, 5, 9, 9])],
        [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": {"counts": [1], "size": [30, 40]}}],
    ],
)
def test_data_without_an_object_are_refused_and_never_copied(things: list[dict[str, Any]], tmp_path: Path) -> None:
    path, out = write_json(tmp_path / "a.json", coco(None, things)), tmp_path / "out.json"
    for args in ((), ("--train-annotations", write_json(tmp_path / "train.json", coco()))):
        code, report, _ = checked(path, "--fix", out, *args)
        assert code == 1 and not out.exists() and "out.json was not written: no object would be left" in report
    code, report, _ = checked(path)
    assert code == 1 and "training does not accept it" in report and "to write a copy" not in report
    assert re.search("^  refuses +objects to train on are missing", report, re.M)


def test_doubts_and_notes_are_printed(tmp_path: Path) -> None:
    row = thing(1, 1, segmentation=[[1, 1, 9, 1, 9, 9]])
    del row["bbox"]
    code, report, _ = checked(write_json(tmp_path / "a.json", coco([image(n) for n in range(3)], [row])))
    assert code == 0
    assert "  1 annotations without a bbox get that of their polygons\n" in report
    assert "2 of 3 images (67%) have no objects: check that their labels are there" in report


def test_a_root_without_validation_images_is_checked_and_trained_on(tmp_path: Path) -> None:
    """As the README has it: JPEGImages/ and Annotations/ in one folder."""
    write_images(tmp_path / "JPEGImages", small())
    write_voc(tmp_path / "Annotations", small())
    code, report, _ = checked("--root", tmp_path, "--workers", "1")
    assert code == 0 and report.count("training accepts it") == 1
    assert "no validation images: " in report and "--data.val-fraction" in report


def test_the_command_that_repairs_a_split_of_data_yaml_repairs_that_split(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_images(tmp_path / "images" / folder, coco([image(n) for n in (1, 2)], []))
        (tmp_path / "labels" / folder).mkdir(parents=True)
        for number in (1, 2):
            (tmp_path / "labels" / folder / f"{number}.txt").write_text("0 0.5 0.5 0.25 0.2\n")
    (tmp_path / "data.yaml").write_text("train: [images/a]\nval: [images/b, val.txt]\nnames: [cat]\n")
    (tmp_path / "val.txt").write_text("images/b/1.png\n")
    (tmp_path / "images" / "b" / "2.png").write_bytes(b"")
    code, report, _ = checked("--root", tmp_path, "--workers", "1")
    (command,) = re.findall("to write a copy that it accepts: python -m detr_fabric.check (.*)", report)
    assert code == 1 and report.count("training accepts it") == 1
    out = tmp_path / "out.json"
    assert checked(*shlex.split(command.replace("OUT.json", str(out))), "--workers", "1")[0] == 0
    assert list(objects(read_annotations(out))) == ["images/b/1.png"]
    data = DataConfig(root=str(tmp_path), val_images=str(tmp_path), val_annotations=str(out))
    _, val = build_datasets(Config(data=data).resolve().data, 0)
    assert len(val) == 1
