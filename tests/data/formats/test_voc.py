"""Pascal VOC folders: the same data as the COCO file that they were made from, or one clear sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detr_fabric.config import Config, DataConfig
from detr_fabric.data.build import build_datasets
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.ground_truth import ground_truth
from detr_fabric.data.transforms import EvalTransform
from detr_fabric.errors import UserError
from detr_fabric.evaluate.coco import Detections, score
from tests.checking import checked
from tests.coco_files import coco, image, thing, write_images, write_root
from tests.format_files import objects, small, write_voc

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
    assert score(ground_truth(dataset.annotations), ["1"], [right], "pycocotools").stats["AP"] == pytest.approx(1)
