"""Pascal VOC and YOLO folders: the same data as the COCO file that they were made from, or one clear sentence."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch
from coco_files import coco, image, thing, write_images, write_json, write_root
from processes import Job
from test_check import checked

from detr_fabric.config import Config, DataConfig
from detr_fabric.data.annotations import Annotations, read_annotations
from detr_fabric.data.categories import Categories
from detr_fabric.data.coco import CocoDetection
from detr_fabric.data.loader import build_datasets
from detr_fabric.data.transforms import EvalTransform
from detr_fabric.errors import UserError
from detr_fabric.scoring import Detections, score


def by_image(content: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    return [(i, [a for a in content["annotations"] if a["image_id"] == i["id"]]) for i in content["images"]]


def write_voc(folder: Path, content: dict[str, Any]) -> Path:
    """The annotations as VOC has them: whole pixels, counted from 1, the last one included."""
    folder.mkdir(parents=True)
    names = {category["id"]: category["name"] for category in content["categories"]}
    for entry, things in by_image(content):
        objects = ""
        for row in things:
            x, y, w, h = row["bbox"]
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            box = "".join(f"<{name}>{value:.0f}</{name}>" for name, value in corners.items())
            objects += f"<object><name>{escape(names[row['category_id']])}</name>"
            objects += f"<difficult>{row.get('iscrowd', 0)}</difficult><bndbox>{box}</bndbox></object>"
        size = f"<size><width>{entry['width']}</width><height>{entry['height']}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{entry['file_name']}</filename>{size}{objects}</annotation>"
        (folder / Path(entry["file_name"]).with_suffix(".xml")).write_text(text)
    return folder


def write_yolo(root: Path, content: dict[str, Any], digits: int = 17) -> Path:
    """labels/ beside images/, and data.yaml."""
    (root / "labels").mkdir(parents=True)
    numbers = {category["id"]: number for number, category in enumerate(content["categories"])}
    for entry, things in by_image(content):
        lines = []
        for row in things:
            (x, y, w, h), width, height = row["bbox"], entry["width"], entry["height"]
            parts = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(" ".join([str(numbers[row["category_id"]]), *(f"{part:.{digits}f}" for part in parts)]))
        if lines:
            (root / "labels" / Path(entry["file_name"]).with_suffix(".txt")).write_text("\n".join(lines) + "\n")
    names = [category["name"] for category in content["categories"]]
    (root / "data.yaml").write_text(f"train: images\nval: images\nnc: {len(names)}\nnames: {json.dumps(names)}\n")
    return root


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


def objects(annotations: Annotations) -> dict[str, list[tuple[str, bool, list[float]]]]:
    """File name → class names, crowds and boxes, in the file's order."""
    names = [annotations.categories.name(label) for label in annotations.labels]
    rows = list(zip(names, annotations.crowd.tolist(), annotations.boxes.tolist(), strict=True))
    files = annotations.file_names.tolist()
    return {file: rows[annotations.objects(index)] for index, file in enumerate(files)}


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
    return score(dataset.ground_truth(), dataset.image_ids, found, "pycocotools").stats


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


def small() -> dict[str, Any]:
    """Four images, one without objects, one in a folder; two classes."""
    images = [image(1), image(2), image(3), image(4)]
    things = [thing(1, 1), thing(2, 2, category=2), thing(3, 1, box=[0, 0, 40, 30]), thing(4, 4, box=[39, 29, 1, 1])]
    return coco(images, things)


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


def test_polygons_and_numbered_names_are_read(tmp_path: Path) -> None:
    content = coco([image(1)], [])
    write_images(tmp_path / "images", content)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("1 0.25 0.5 0.5 0.1 0.75 0.5\n\n0 0.5 0.5 1 1.0005")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: ./images\nnames:\n  0: cat\n  1: dog\n")
    found = read_annotations(tmp_path / "data.yaml", images=tmp_path / "images")
    np.testing.assert_allclose(found.boxes, [[10, 3, 20, 12], [0, -0.0075, 40, 30.015]], atol=1e-9)
    assert [found.categories.name(label) for label in found.labels] == ["dog", "cat"]


VOC = "<annotation><filename>1.png</filename>{}</annotation>"
BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox>"
CAT = f"<object><name>cat</name>{BOX.format(8)}</object>"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "<annotation>\n<object>",
            r"1.xml is broken XML at line 2, column 8 \(no element found\): correct or remove it",
        ),
        ("<html></html>", "1.xml is no Pascal VOC annotation, its root is <html>"),
        ("", "1.xml is broken XML at line 1"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "1.xml"),
        (VOC.format("<object>" + BOX.format(8) + "</object>"), "1.xml: object 1 has no name"),
        (VOC.format("<object><name>cat</name></object>"), r"1.xml: object 1 \(cat\) has no number as bndbox/xmin"),
        (VOC.format(f"<object><name>cat</name>{BOX.format('x')}</object>"), r"object 1 \(cat\) .* bndbox/xmax"),
        (VOC.format(f"<object><name>cat</name>{BOX.format('inf')}</object>"), r"'1.xml object 1 \(cat\)'"),
        (VOC.format("<size><width>x</width></size>"), "1.xml: its image has no number as size/width"),
        (VOC.format("<size><width>-3</width></size>" + CAT), "width or height that is no positive whole number"),
        (f"<annotation><filename>../../etc/passwd</filename>{CAT}</annotation>", "no path inside the image folder"),
        ("<annotation><object/></annotation>", "1.xml: object 1 has no name"),
        (VOC.format(""), "none of its .xml files has an object"),
        (f"<annotation>{CAT}</annotation>", "file_name that is no path"),
        (
            '<!DOCTYPE a [<!ENTITY b "bomb"><!ENTITY c "&b;&b;">]>' + VOC.format("<object><name>&c;</name></object>"),
            "1.xml declares a document type",
        ),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd">' + VOC.format(""), "1.xml declares a document type"),
    ],
)
def test_a_broken_voc_file_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "1.xml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_annotations(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"labels/1.txt": "0 0.5 0.5 0.1"}, "1.txt line 1 has 4 fields"),
        ({"labels/1.txt": "0 0.5 0.5 0.1 0.1 0.9"}, "1.txt line 1 has 6 fields"),
        ({"labels/1.txt": "\n0 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1 0.1"}, "1.txt line 3: class 2 is not among the 2 names"),
        ({"labels/1.txt": "-1 0.5 0.5 0.1 0.1"}, "class -1"),
        ({"labels/1.txt": "cat 0.5 0.5 0.1 0.1"}, "1.txt line 1 is no class number and fractions"),
        ({"labels/1.txt": "0 20 15 10 10"}, "1.txt line 1: a box has fractions"),
        ({"labels/1.txt": "0 nan 0.5 0.1 0.1"}, "1.txt line 1: a box has fractions"),
        ({"labels/1.txt": "\xff\xfe\x00"}, None),
        ({"labels/9.txt": "0 0.5 0.5 0.1 0.1"}, "9.txt has no image of its name"),
        ({"data.yaml": "names: [cat"}, "data.yaml is broken YAML at line"),
        ({"data.yaml": "names: {1: cat}"}, "`names` is no list of class names"),
        ({"data.yaml": "names: []"}, "`names` is no list of class names"),
        ({"data.yaml": "names: !!python/object/apply:os.system ['true']"}, "data.yaml is broken YAML"),
        ({"data.yaml": "- cat"}, "data.yaml is no data.yaml of YOLO"),
        ({"images/1.jpg": "x"}, "image ids are used more than once"),
    ],
)
def test_a_broken_yolo_file_is_one_sentence(files: dict[str, str], words: str | None, tmp_path: Path) -> None:
    write_images(tmp_path / "images", coco([image(1)], []))
    write_yolo(tmp_path, coco([image(1)], []))
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words or "cannot be read") as caught:
        read_annotations(tmp_path / "data.yaml", images=tmp_path / "images")
    assert "\n" not in str(caught.value)


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
        ("train: 3", "`train` names no folder"),
        ("val: x", "`train` names no folder"),
    ):
        yaml.write_text(f"{given}\nnames: [cat]\n")
        with pytest.raises(UserError, match=words):
            build_datasets(replace(Config(), data=DataConfig(root=str(yaml))).resolve().data, seed=0)


def test_data_yaml_is_a_root_to_train_on_and_to_check(tmp_path: Path) -> None:
    """As exports have it: train/images beside data.yaml, which calls it ../train/images."""
    content = small()
    for part in ("train", "valid"):
        write_images(tmp_path / part / "images", content)
        write_yolo(tmp_path / part, content)
        (tmp_path / part / "data.yaml").unlink()
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cat, dog]\n")
    for root in ("data.yaml", "."):
        data = replace(Config(), data=DataConfig(root=str(tmp_path / root))).resolve().data
        train, val = build_datasets(data, seed=0)
        assert (len(train), len(val), train.folder) == (4, 4, tmp_path.resolve() / "train" / "images")
        assert train.load(0)[1].tolist() == [[10, 5, 30, 15], [0, 0, 40, 30]]
    code, out, _ = checked("--root", tmp_path / "data.yaml", "--workers", "1")
    assert code == 0 and out.count("training accepts it") == 2, out
    (tmp_path / "valid" / "images" / "2.png").write_bytes(b"\x89PNG")
    code, out, _ = checked("--root", tmp_path, "--workers", "1")
    assert code == 1 and "2.png" in out
    mend = re.search(r"to write a copy that it accepts: python -m detr_fabric.check (.*)", out)
    assert mend is not None
    code, out, _ = checked(*(shlex.split(mend[1].replace("OUT.json", str(tmp_path / "val.json")))), "--workers", "1")
    assert code == 0 and len(read_annotations(tmp_path / "val.json")) == 3, out

    args = ["--preset", "debug", "--train.accelerator", "cpu", "--data.root", str(tmp_path / "train")]
    args += ["--data.train-images", "train/images", "--data.train-annotations", "data.yaml", "--data.scales", "64"]
    args += ["--data.val-fraction", "0.3", "--model.backbone-weights", "none", "--train.run-dir", "run"]
    job = Job(*args, "--train.batch-size", "1", cwd=tmp_path)
    assert job.wait() == [0] and "2 classes" in job.text(), job.text()


def test_a_voc_folder_with_its_lists_is_a_root(tmp_path: Path) -> None:
    content = small()
    write_images(tmp_path / "JPEGImages", content)
    write_voc(tmp_path / "Annotations", content)
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("1\n2  1\n4 -1\n")
    (lists / "val.txt").write_text("3\n1\n")
    data = replace(Config(), data=DataConfig(root=str(tmp_path))).resolve().data
    train, val = build_datasets(data, seed=0)
    assert (train.image_ids, val.image_ids) == (["1", "2", "4"], ["1", "3"])
    assert objects(val.annotations) == {"1.png": objects(train.annotations)["1.png"], "3.png": []}
    code, out, _ = checked("--root", tmp_path, "--workers", "1")
    assert code == 0 and out.count("training accepts it") == 2, out
    for text, words in (
        ("1\n9\n", "val.txt names '9', which has no .xml file"),
        ("../../secret", "names '../../secret'"),
        ("", "names no image"),
        ("1\n1", "image ids are used more than once"),
    ):
        (lists / "val.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            build_datasets(data, seed=0)


def test_check_writes_a_voc_folder_as_coco_json(tmp_path: Path) -> None:
    content = small()
    write_images(tmp_path / "JPEGImages", content)
    write_voc(tmp_path / "Annotations", content)
    args = (tmp_path / "Annotations", "--images", tmp_path / "JPEGImages", "--workers", "1")
    code, out, _ = checked(*args, "--fix", tmp_path / "coco.json")
    assert code == 0 and "training accepts the copy" in out, out
    assert objects(read_annotations(tmp_path / "coco.json")) == objects(read_annotations(tmp_path / "Annotations"))


def test_difficult_objects_are_neither_trained_on_nor_missed(tmp_path: Path) -> None:
    content = coco([image(1)], [thing(1, 1), thing(2, 1, box=[1, 1, 5, 5], iscrowd=1)])
    write_root(tmp_path, content, content)
    found = read_annotations(write_voc(tmp_path / "voc", content))
    dataset = CocoDetection(tmp_path / "train2017", found, EvalTransform(64, 64), 0)
    assert len(dataset.load(0)[1]) == 1
    right = Detections("1", torch.tensor([0.9]), torch.tensor([0]), torch.tensor([[10.0, 5, 30, 15]]))
    assert score(dataset.ground_truth(), ["1"], [right], "pycocotools").stats["AP"] == pytest.approx(1)
