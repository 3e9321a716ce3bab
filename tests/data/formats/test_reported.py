"""Shapes of data that people reported to be read wrongly: each is read right, or refused with the reason.

Boxes are x, y, width, height in pixels of images of 40 x 30.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_fabric.config import Config, DataConfig
from detr_fabric.data.build import build_datasets
from detr_fabric.data.doubts import doubts
from detr_fabric.data.formats.annotations import Annotations, read_annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.formats.data_yaml import class_names
from detr_fabric.data.summary import summary
from detr_fabric.errors import UserError
from tests.coco_files import coco, image, thing, write_images, write_json
from tests.format_files import objects, small, write_voc

BOX = [10, 5, 20, 10]
LINE = "0 0.5 0.3333333333 0.5 0.3333333333"  # BOX


def yolo(root: Path, labels: dict[str, str], yaml: str = "", names: str = "[cat, dog]") -> Path:
    """images/NAME.png and labels/NAME.txt for every label, and data.yaml."""
    write_images(root / "images", {"images": [image(0, file_name=f"{name}.png") for name in labels]})
    (root / "labels").mkdir()
    for name, text in labels.items():
        (root / "labels" / f"{name}.txt").write_text(text)
    (root / "data.yaml").write_text(f"train: images\nval: images\nnames: {names}\n{yaml}\n")
    return root / "data.yaml"


def train(root: Path, **settings: Any) -> Annotations:
    """The annotations that training would use."""
    return build_datasets(replace(Config(), data=DataConfig(root=str(root), **settings)).resolve().data, 0)[
        0
    ].annotations


def voc_object(corners: tuple[Any, ...], name: str = "cat") -> str:
    box = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"


def write_xml(file: Path, filename: str, *corners: tuple[Any, ...]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    size = "<size><width>40</width><height>30</height></size>"
    body = "".join(map(voc_object, corners))
    file.write_text(f"<annotation><filename>{filename}</filename>{size}{body}</annotation>")


# Without an object to train on


@pytest.mark.parametrize(
    ("things", "reason"),
    [
        ([], "only no annotations for 2 images"),
        ([thing(n, 1, iscrowd=1) for n in range(24)], "only 24 crowds for 2 images"),
        ([thing(1, 1, box=[50, 5, 9, 9]), thing(2, 1, iscrowd=1)], "only 1 crowds, 1 boxes without area for 2 images"),
    ],
)
def test_annotations_without_an_object_are_refused_for_training(
    things: list[dict[str, Any]], reason: str, tmp_path: Path
) -> None:
    path = write_json(tmp_path / "a.json", coco(None, things))
    with pytest.raises(UserError, match=f"a.json: no object to train on, {reason}: check the labels"):
        read_annotations(path).require_objects(path)
    write_images(tmp_path / "images", coco())
    data = DataConfig(train_images=str(tmp_path / "images"), train_annotations=str(path), val_fraction=0.5)
    with pytest.raises(UserError, match="no object to train on"):
        build_datasets(replace(Config(), data=data).resolve().data, 0)


def test_polygons_without_a_bbox_get_the_box_around_them(tmp_path: Path) -> None:
    triangle, far = [10, 5, 30, 5, 20, 15], [1, 2, 3, 2, 3, 25.5]
    things = [
        thing(1, 1, segmentation=[triangle]),
        thing(2, 1, segmentation=[triangle, far]),
        thing(3, 1, box=[1, 1, 2, 2]),
    ]
    for absent in ({}, {"bbox": None}, {"bbox": []}):
        for row in things[:2]:
            row.pop("bbox", None)
            row |= absent
        found = read_annotations(write_json(tmp_path / "a.json", coco(None, things)))
        assert found.boxes.tolist() == [BOX, [1, 2, 29, 23.5], [1, 1, 2, 2]]
        assert found.notes == ("2 annotations without a bbox get that of their polygons",)
        assert found.areas.tolist() == [200, 29 * 23.5, 4]


@pytest.mark.parametrize("segmentation", [[], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, "6"]], {"counts": [1]}, None, 7])
def test_a_segmentation_that_gives_no_box_is_refused(segmentation: Any, tmp_path: Path) -> None:
    row = thing(3, 1, segmentation=segmentation)
    del row["bbox"]
    with pytest.raises(UserError, match="have no 'bbox'"):
        read_annotations(write_json(tmp_path / "a.json", coco(None, [thing(1, 1), row])))


def test_labels_of_names_with_dots_and_in_capitals_are_found(tmp_path: Path) -> None:
    path = yolo(tmp_path, {"IMG_1_jpg.rf.0123abcd": LINE, "b.c": LINE})
    (tmp_path / "labels" / "b.c.txt").rename(tmp_path / "labels" / "b.c.TXT")
    assert {name: len(rows) for name, rows in objects(train(path)).items()} == {
        "IMG_1_jpg.rf.0123abcd.png": 1,
        "b.c.png": 1,
    }


def test_labels_that_match_no_image_are_refused_and_images_without_labels_are_told(tmp_path: Path) -> None:
    path = yolo(tmp_path, {str(number): LINE for number in range(4)})
    for number in range(2):
        (tmp_path / "labels" / f"{number}.txt").unlink()
    found = train(path)
    assert found.notes == ("label files: 2 boxes; 2 of 4 images have none",)
    assert doubts(found) == ["2 of 4 images (50%) have no objects: check that their labels are there"]
    assert "2 images without objects" in summary(found, 100)
    for number in range(2, 4):
        (tmp_path / "labels" / f"{number}.txt").unlink()
    with pytest.raises(UserError, match="no object to train on.*no objects; 4 of 4 images have none"):
        train(path)


# YOLO's lines


def test_lines_are_poses_if_data_yaml_has_kpt_shape(tmp_path: Path) -> None:
    pose = f"{LINE} 0.4 0.3 2 0.6 0.4 0 0 0 0"
    path = yolo(tmp_path, {"a": f"{pose}\n{LINE}"}, "kpt_shape: [3, 3]")
    found = train(path)
    np.testing.assert_allclose(found.boxes, [BOX, BOX], atol=1e-6)
    assert found.notes == ("label files: 1 boxes, 1 poses; 0 of 1 images have none",)
    (tmp_path / "labels" / "a.txt").write_text(f"{pose} 0.5")
    with pytest.raises(UserError, match=r"a.txt line 1 has 15 fields where kpt_shape in data.yaml makes 14"):
        train(path)


def test_lines_that_may_be_poses_or_polygons_are_refused_until_data_yaml_says_which(tmp_path: Path) -> None:
    points = " 0.4 0.3 0.6 0.4 0.5 0.2"
    path = yolo(tmp_path, {"a": LINE + points, "b": LINE + points + "\n" + LINE})
    with pytest.raises(UserError, match="the 2 lines of 11 fields may be polygons, or boxes with keypoints"):
        train(path)
    yaml = path.read_text()
    path.write_text(f"{yaml}\nkpt_shape: [3, 2]\n")
    np.testing.assert_allclose(train(path).boxes, [BOX] * 3, atol=1e-6)
    path.write_text(f"{yaml}\ntask: segment\n")
    np.testing.assert_allclose(train(path).boxes[0], [16, 6, 8, 6], atol=1e-6)
    path.write_text(yaml)
    (tmp_path / "labels" / "a.txt").write_text("0 0.25 0.5 0.5 0.1 0.75 0.5 0.3 0.8 0.2 0.7")  # it leaves that "box"
    assert train(path).notes == ("label files: 1 boxes, 2 polygons; 0 of 2 images have none",)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{LINE} 0.93", "has 6 fields, as predictions with a confidence or a track id"),
        (f"{LINE} 0.93 7", "has 7 fields, as predictions with a confidence or a track id"),
        (f"{LINE} 0.93 1", "has 7 fields, as predictions with a confidence or a track id"),
        ("0 50 33 50 33", "fractions of the image, in .0, 1., not pixels or percent"),
        ("0.5 0.5 0.3 0.5 0.3", "class 0.5 is not among the 2 names"),
        (f"{LINE} 0.4 0.3 2", "if it is a pose"),
    ],
)
def test_lines_that_are_no_labels_are_refused(line: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"a.txt line 2.*{words}"):
        train(yolo(tmp_path, {"a": f"{LINE}\n{line}"}))


def test_a_class_may_be_written_as_a_float(tmp_path: Path) -> None:
    found = train(yolo(tmp_path, {"a": "1.0" + LINE[1:]}))
    assert [found.categories.name(label) for label in found.labels] == ["dog"]


def test_class_names_are_read_as_they_are_written(tmp_path: Path) -> None:
    written = ["on", "off", "no", "yes", "null", "1.0", "007", "2024-01-01", "1e3"]
    for names in (str(written).replace("'", ""), "".join(f"\n  {n}: {name}" for n, name in enumerate(written))):
        (tmp_path / "data.yaml").write_text(f"names: {names}\n")
        assert class_names(tmp_path / "data.yaml") == written


# Fields that would spoil the scores


@pytest.mark.parametrize("area", [-200, 2e10, float("inf")])
def test_an_area_that_scoring_would_ignore_is_refused(area: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 annotations have an area that is no number from 0 to 1e.10 .3.: correct"):
        read_annotations(write_json(tmp_path / "a.json", coco(None, [thing(1, 1), thing(3, 1, area=area)])))


def test_areas_that_do_not_fit_are_doubted(tmp_path: Path) -> None:
    things = [thing(1, 1, area=0), thing(2, 1, area=999), thing(3, 1, area=200)]
    (doubt,) = doubts(read_annotations(write_json(tmp_path / "a.json", coco([image(1)], things))))
    assert doubt.startswith("2 areas are 0 or larger than their box")


def test_categories_of_one_name_are_told_apart(tmp_path: Path) -> None:
    table = [{"id": 1, "name": "other"}, {"id": 2, "name": "other"}, {"id": 3, "name": "cat"}]
    things = [thing(n, 1, category=n) for n in (1, 2, 3)]
    categories = read_annotations(write_json(tmp_path / "a.json", coco(None, things, table))).categories
    assert [categories.name(label) for label in range(3)] == ["other (1)", "other (2)", "cat"]
    write_voc(tmp_path / "voc", coco(None, [thing(1, 1)], [{"id": 1, "name": "other"}]))
    with pytest.raises(UserError, match="2 categories named 'other'"):
        read_annotations(tmp_path / "voc", categories)


def test_an_empty_super_category_with_the_name_of_a_class_is_left_out(tmp_path: Path) -> None:
    table = [{"id": 0, "name": "fish", "supercategory": "none"}, {"id": 1, "name": "fish", "supercategory": "fish"}]
    path = write_json(tmp_path / "a.json", coco(None, [thing(1, 1), thing(2, 2)], table))
    training = read_annotations(path)
    assert training.categories == Categories((1,), ("fish",))
    assert training.notes == ("category 0 is left out: another one named 'fish' has the objects",)
    assert read_annotations(path, training.categories).labels.tolist() == [0, 0]
    found = read_annotations(yolo(tmp_path / "yolo", {"a": LINE}, names="[fish]"), training.categories)
    assert [found.categories.id(label) for label in found.labels] == [1]


def test_boxes_in_fractions_or_percent_and_shared_files_are_said_when_training_starts(tmp_path: Path) -> None:
    entry = image(1, width=400, height=300)
    for factor, word in ((1 / 400, "fractions"), (1 / 4, "percentages"), (1, None)):
        things = [thing(n, 1, box=[factor * v for v in (380 - 30 * n, 9 * n, 20, 15)]) for n in range(12)]
        found = doubts(read_annotations(write_json(tmp_path / "a.json", coco([entry], things))))
        assert len(found) == (word is not None) and (word or "") in "".join(found)
    images = [image(n, file_name="a.png") for n in range(3)]
    found = read_annotations(write_json(tmp_path / "a.json", coco(images, [thing(n, n) for n in range(3)])))
    assert summary(found, 100) == "3 objects, 2 images with the file of another one"


# Pascal VOC


def test_corners_with_decimals_or_a_zero_count_from_zero(tmp_path: Path) -> None:
    write_xml(tmp_path / "cvat" / "1.xml", "1.png", ("10.00", "5.00", "30.00", "15.00"), (11, 6, 30, 15))
    found = read_annotations(tmp_path / "cvat")
    assert found.boxes.tolist() == [BOX, BOX]
    assert found.notes == ("1 boxes have decimals: their corners are coordinates from 0, not pixels from 1",)
    write_xml(tmp_path / "zero" / "1.xml", "1.png", (10, 5, 30, 15))
    write_xml(tmp_path / "zero" / "2.xml", "2.png", (0, 5, 30, 15))
    found = read_annotations(tmp_path / "zero")
    assert found.boxes.tolist() == [BOX, [0, 5, 30, 10]]
    assert found.notes[0].startswith("some xmin or ymin is 0: all corners are coordinates from 0")


def test_both_lists_of_a_folder_count_alike(tmp_path: Path) -> None:
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name, left in (("1", 10), ("2", 0)):
        write_xml(tmp_path / "Annotations" / f"{name}.xml", f"{name}.png", (left, 5, 30, 15))
        (lists / f"{name}.txt").write_text(name)
    assert [read_annotations(lists / f"{n}.txt").boxes.tolist() for n in (1, 2)] == [[BOX], [[0, 5, 30, 10]]]


def test_the_name_of_the_xml_file_decides_which_image_it_is_of(tmp_path: Path) -> None:
    content = small()
    write_images(tmp_path / "JPEGImages", content)
    for number in range(1, 5):
        write_xml(tmp_path / "Annotations" / f"{number}.xml", "1.png", (10 + number, 6, 30, 15))
    found = read_annotations(tmp_path / "Annotations", images=tmp_path / "JPEGImages")
    assert {name: rows[0][2][0] for name, rows in objects(found).items()} == {f"{n}.png": 9 + n for n in range(1, 5)}
    assert found.notes == ("3 XML files name another image in <filename>: their own names decide",)
    (tmp_path / "JPEGImages" / "2.png").unlink()
    with pytest.raises(UserError, match="2.xml and 1.xml are both of the image 1.png: restore the image of 2.xml"):
        read_annotations(tmp_path / "Annotations", images=tmp_path / "JPEGImages")


@pytest.mark.parametrize("filename", ["1", "", "1.jpg", "C:\\Users\\me\\1.png", "../1.png"])
def test_a_filename_without_extension_or_of_another_machine_does_not_matter(filename: str, tmp_path: Path) -> None:
    write_images(tmp_path / "JPEGImages", coco([image(1)], []))
    write_xml(tmp_path / "Annotations" / "1.xml", filename, (11, 6, 30, 15))
    for images in (tmp_path / "JPEGImages", None):  # None: found beside Annotations
        found = read_annotations(tmp_path / "Annotations", images=images)
        assert objects(found) == {"1.png": [("cat", False, BOX)]} and found.notes == ()


def test_an_xml_file_of_another_name_keeps_its_filename(tmp_path: Path) -> None:
    write_images(tmp_path / "JPEGImages", coco([image(1, file_name="photo.png")], []))
    write_xml(tmp_path / "Annotations" / "1.xml", "photo.png", (11, 6, 30, 15))
    assert objects(read_annotations(tmp_path / "Annotations")) == {"photo.png": [("cat", False, BOX)]}


def test_two_images_of_one_xml_file_are_refused_unless_filename_tells(tmp_path: Path) -> None:
    write_images(tmp_path / "JPEGImages", coco([image(1), image(2, file_name="1.bmp")], []))
    write_xml(tmp_path / "Annotations" / "1.xml", "1.bmp", (11, 6, 30, 15))
    assert list(objects(read_annotations(tmp_path / "Annotations"))) == ["1.bmp"]
    write_xml(tmp_path / "Annotations" / "1.xml", "1", (11, 6, 30, 15))
    with pytest.raises(UserError, match="1.bmp, 1.png are all images of 1.xml"):
        read_annotations(tmp_path / "Annotations")


def test_the_same_name_in_two_folders_is_two_images(tmp_path: Path) -> None:
    for folder, left in (("a", 11), ("b", 21)):
        write_images(tmp_path / "JPEGImages" / folder, coco([image("0001")], []))
        write_xml(tmp_path / "Annotations" / folder / "0001.xml", f"{folder}/0001.png", (left, 6, 30, 15))
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name in ("train", "val"):
        (lists / f"{name}.txt").write_text("a/0001\nb/0001\n")
    for found in (train(tmp_path), read_annotations(tmp_path / "Annotations", images=tmp_path / "JPEGImages")):
        assert found.image_ids.tolist() == ["a/0001", "b/0001"]
        assert {name: rows[0][2][0] for name, rows in objects(found).items()} == {"a/0001.png": 10, "b/0001.png": 20}


# Folders


def test_a_root_with_only_images_and_annotations_is_trained_on(tmp_path: Path) -> None:
    content = small()
    write_images(tmp_path / "JPEGImages", content)
    write_voc(tmp_path / "Annotations", content)
    assert len(train(tmp_path, val_fraction=0.3)) in (1, 2, 3)
    with pytest.raises(UserError, match="has no ImageSets/Main/val.txt: add both lists, or .* --data.val-fraction"):
        train(tmp_path)


def test_back_slashes_in_file_names_are_read_as_slashes(tmp_path: Path) -> None:
    images = [image(1, file_name="sub\\1.png"), image(2)]
    found = read_annotations(write_json(tmp_path / "a.json", coco(images)))
    assert found.file_names.tolist() == ["sub/1.png", "2.png"]
    assert found.notes == ("1 file names have back-slashes, which are read as slashes",)


def test_linked_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        for name in ("here", "there"):
            (tmp_path / name / kind).mkdir(parents=True)
    write_images(tmp_path / "here" / "images", coco([image("a")], []))
    write_images(tmp_path / "there" / "images", coco([image("b")], []))
    (tmp_path / "here" / "labels" / "a.txt").write_text(LINE)
    (tmp_path / "there" / "labels" / "b.txt").write_text(LINE)
    for kind in ("images", "labels"):
        os.symlink(tmp_path / "there" / kind, tmp_path / "here" / kind / "sub")
        os.symlink(tmp_path / "here" / kind, tmp_path / "there" / kind / "back")
    (tmp_path / "here" / "data.yaml").write_text("train: images\nval: images\nnames: [cat]\n")
    assert list(objects(train(tmp_path / "here"))) == ["a.png", "sub/b.png"]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "data.yaml").write_text("train: images\nval: images\nnames: [cat]\n")
    for kind in ("images", "labels"):
        os.symlink(tmp_path / "there" / kind, tmp_path / "set" / kind)
    assert {name: len(rows) for name, rows in objects(train(tmp_path / "set")).items()} == {"b.png": 1, "back/a.png": 1}


@pytest.mark.parametrize(
    "entry", ["train.txt", "[images/a, images/b]", "[train.txt, images/b]", '["images\\\\a", ../images/b]']
)
def test_lists_and_several_folders_in_data_yaml_are_read(entry: str, tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        write_images(tmp_path / "images" / folder, coco([image(1), image(2)], []))
        (tmp_path / "labels" / folder).mkdir(parents=True)
        (tmp_path / "labels" / folder / "1.txt").write_text(LINE)
    names = ["./images/a/1.png", "images/a/2.png", f"{tmp_path}/images/b/1.png", "images\\b\\2.png", ""]
    (tmp_path / "train.txt").write_text("\n".join(names))
    (tmp_path / "data.yaml").write_text(f"train: {entry}\nval: [images/c]\nnames: [cat]\n")
    found = train(tmp_path / "data.yaml")
    assert {name: len(rows) for name, rows in objects(found).items()} == {
        "images/a/1.png": 1,
        "images/a/2.png": 0,
        "images/b/1.png": 1,
        "images/b/2.png": 0,
    }
    (tmp_path / "train.txt").write_text("images/a/1.png\n/etc/passwd\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nval: images/c\nnames: [cat]\n")
    with pytest.raises(UserError, match="train.txt line 2: /etc/passwd is no file beside or below"):
        train(tmp_path / "data.yaml")


def test_other_suffixes_of_jpeg_files_are_images(tmp_path: Path) -> None:
    path = yolo(tmp_path, {"a": LINE})
    write_images(tmp_path / "images", coco([image(1)], []))
    (tmp_path / "images" / "1.png").rename(tmp_path / "images" / "1.JFIF")
    (tmp_path / "labels" / "1.txt").write_text(LINE)
    assert list(objects(train(path))) == ["1.JFIF", "a.png"]


def test_sizes_that_annotations_lack_come_from_the_files(tmp_path: Path) -> None:
    content = coco([{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png", "width": 40}])
    write_images(tmp_path / "images", content)
    path = write_json(tmp_path / "a.json", content)
    assert read_annotations(path, images=tmp_path / "images").sizes.tolist() == [[30, 40]] * 2
    (tmp_path / "images" / "1.png").write_bytes(b"broken")
    assert read_annotations(path, images=tmp_path / "images").sizes.tolist() == [[0, 0], [30, 40]]
