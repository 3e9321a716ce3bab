"""Pascal VOC and YOLO folders: the same data as the COCO file that they were made from, or one clear sentence."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detr_fabric.config import Config, DataConfig
from detr_fabric.data.build import build_datasets
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import Annotations, read_annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.ground_truth import ground_truth
from detr_fabric.data.transforms import EvalTransform
from detr_fabric.errors import UserError
from detr_fabric.evaluate.coco import Detections, score
from tests.coco_files import coco, image, thing, write_images, write_json
from tests.format_files import objects, small, write_voc, write_yolo


def part_of_coco(coco_mini: Path) -> tuple[dict[str, Any], Path]:
    """40 real images with their objects, in whole pixels and without what the other layouts don't know."""
    content = json.loads((coco_mini / "annotations" / "instances_val2017.json").read_text())
    images = content["images"][:40]
    kept = {entry["id"] for entry in images}
    annotations = []
    for row in content["annotations"]:
        left, top, right, bottom = (round(v) for v in np.add(row["bbox"], [0, 0, *row["bbox"][:2]]))
        if row["image_id"] in kept:
            box = [left, top, max(right - left, 1), max(bottom - top, 1)]
            annotations.append({key: row[key] for key in ("id", "image_id", "category_id", "iscrowd")} | {"bbox": box})
    named = {row["category_id"] for row in annotations}
    categories = [category for category in content["categories"] if category["id"] in named]
    return {"images": images, "annotations": annotations, "categories": categories}, coco_mini / "val2017"


def statistics(annotations: Annotations, folder: Path) -> dict[str, float]:
    """The scores of made-up detections, which are near the true objects of COCO, or not."""
    rng = np.random.default_rng(0)
    dataset = CocoDetection(folder, annotations, EvalTransform(800, 1333), 0)
    by_name = {annotations.categories.name(label): label for label in annotations.categories.labels.values()}
    found = []
    for index, (file, rows) in enumerate(sorted(objects(annotations).items())):
        assert annotations.file_names[index] == file
        boxes, labels = [], []
        for name, _, (x, y, w, h) in [row for row in rows for _ in range(3)]:
            x, y, w, h = np.round([x, y, w, h]) + rng.normal(0, 0.1, 4) * [w, h, w, h]
            boxes.append([x, y, x + max(w, 1), y + max(h, 1)])
            labels.append(by_name[name])
        tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        scores = torch.from_numpy(rng.random(len(boxes))).float()
        found.append(Detections(dataset.image_ids[index], scores, torch.tensor(labels, dtype=torch.int64), tensor))
    return score(ground_truth(dataset.annotations), dataset.image_ids, found, "pycocotools").stats


def test_coco_as_voc_has_the_same_boxes_and_scores(coco_mini: Path, tmp_path: Path) -> None:
    content, images = part_of_coco(coco_mini)
    before = read_annotations(write_json(tmp_path / "coco.json", content))
    after = read_annotations(write_voc(tmp_path / "Annotations", content))
    assert objects(after) == objects(before) and any(before.crowd)
    expected = statistics(before, images)
    assert 0.05 < expected["AP"] < 0.95
    assert statistics(after, images) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("digits", "pixels", "ap"), [(17, 1e-9, 1e-9), (6, 1e-3, 1e-3)])
def test_coco_as_yolo_has_the_same_boxes_and_scores(
    digits: int, pixels: float, ap: float, coco_mini: Path, tmp_path: Path
) -> None:
    content, images = part_of_coco(coco_mini)
    content["annotations"] = [row | {"iscrowd": 0} for row in content["annotations"]]  # YOLO knows no crowds
    (tmp_path / "yolo").mkdir()
    os.symlink(images, tmp_path / "all")
    (tmp_path / "yolo" / "images").mkdir()
    for entry in content["images"]:
        os.symlink(images / entry["file_name"], tmp_path / "yolo" / "images" / entry["file_name"])
    before = read_annotations(write_json(tmp_path / "coco.json", content))
    root = write_yolo(tmp_path / "yolo", content, digits)
    after = read_annotations(root / "data.yaml", images=root / "images")
    assert after.sizes.tolist() == before.sizes.tolist() and after.categories.names == before.categories.names
    for file, rows in objects(before).items():
        again = objects(after)[file]
        assert [row[:2] for row in again] == [row[:2] for row in rows]
        np.testing.assert_allclose([r[2] for r in again] or 0, [r[2] for r in rows] or 0, rtol=0, atol=pixels)
    assert statistics(after, images) == pytest.approx(statistics(before, images), abs=ap)


def test_both_layouts_equal_their_coco_twin(tmp_path: Path) -> None:
    content = small()
    write_images(tmp_path / "yolo" / "images", content)
    before = read_annotations(write_json(tmp_path / "coco.json", content))
    voc = read_annotations(write_voc(tmp_path / "voc", content))
    root = write_yolo(tmp_path / "yolo", content)
    (root / "labels" / "classes.txt").write_text("cat\ndog\n")
    assert objects(voc) == objects(before)
    for path in (root / "data.yaml", root / "labels"):
        yolo = read_annotations(path, images=root / "images")
        np.testing.assert_allclose(yolo.boxes, before.boxes, atol=1e-9)
        assert (yolo.labels.tolist(), yolo.sizes.tolist()) == (before.labels.tolist(), before.sizes.tolist())
    assert voc.areas.tolist() == before.areas.tolist() == [200.0, 1200.0, 200.0, 1.0]


def test_classes_of_a_training_set_are_found_by_name(tmp_path: Path) -> None:
    """So a model trained on COCO JSON can be evaluated on VOC or YOLO, and validation files may lack classes."""
    content = small()
    training = Categories((7, 8, 9), ("bird", "dog", "cat"))
    write_images(tmp_path / "images", content)
    root = write_yolo(tmp_path, content)
    for found in (
        read_annotations(write_voc(tmp_path / "voc", content), training),
        read_annotations(root / "data.yaml", training, images=root / "images"),
    ):
        assert found.categories == training and found.labels.tolist() == [2, 2, 1, 2]
    unknown = Categories((0, 1), ("bird", "dog"))
    for path in (tmp_path / "voc", root / "data.yaml"):
        with pytest.raises(UserError, match="3 annotations name a category that is not among the categories of the tr"):
            read_annotations(path, unknown, images=root / "images")
    empty = small() | {"annotations": []}
    assert len(read_annotations(write_voc(tmp_path / "empty", empty), training)) == 4


@pytest.mark.process
@pytest.mark.parametrize("layout", ["voc/1.xml", "labels/1.txt", "data.yaml", "ImageSets/Main/train.txt"])
def test_damaged_files_are_read_or_refused_in_one_sentence(layout: str, tmp_path: Path) -> None:
    """Bytes flipped, cut out, repeated and put in: never anything but Annotations or a UserError."""
    content = coco([image(1)], [thing(1, 1), thing(2, 1, category=2)])
    write_images(tmp_path / "images", content)
    write_voc(tmp_path / "voc", content)
    write_voc(tmp_path / "Annotations", content)
    write_yolo(tmp_path, content)
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("1 1\n")
    file = tmp_path / layout
    path = {"voc/1.xml": file.parent, "labels/1.txt": tmp_path / "data.yaml"}.get(layout, file)
    whole, rng = file.read_bytes(), random.Random(0)
    read = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            place, length = rng.randrange(len(damaged) + 1), rng.randint(1, 8)
            piece = damaged[place : place + length]
            new = [bytes(rng.randrange(256) for _ in piece), b"", bytes(piece) * 3, rng.choice(ODD)]
            damaged[place : place + length] = rng.choice(new)
        file.write_bytes(bytes(damaged))
        try:
            read += len(read_annotations(path, images=tmp_path / "images"))
        except UserError as error:
            assert "\n" not in str(error)
    assert 0 < read < 300


ODD = (
    b"\x00",
    b"\xff\xfe",
    b"nan",
    b"-1e999",
    b"9" * 400,
    b"<![CDATA[",
    b"&amp;",
    b"&b;",
    b"\n",
    b"../",
    b"{",
    b"!!set",
)


def test_folders_that_are_no_layout_or_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="without .xml files"):
        read_annotations(tmp_path / "nothing")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(UserError, match="no file names the classes"):
        read_annotations(tmp_path / "labels", images=tmp_path / "nothing")
    with pytest.raises(UserError, match="name the images too"):
        read_annotations(tmp_path / "labels")
    set_up = tmp_path / "set"
    set_up.mkdir()
    yaml = set_up / "data.yaml"
    for given, words in (
        ("train: /etc", "no folder beside or below it"),
        ("train: ../nothing", "no folder beside or below it"),
        ("train: 3", "`train: 3` is no folder"),
        ("val: x", "`train` names no folder"),
    ):
        yaml.write_text(f"{given}\nnames: [cat]\n")
        with pytest.raises(UserError, match=words):
            build_datasets(replace(Config(), data=DataConfig(root=str(yaml))).resolve().data, seed=0)
