"""COCO files: everything that is wrong is named with its ids and counted, everything else loads."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detr_fabric.data.formats.annotations import Annotations, inspect_annotations, read_annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.formats.coco_classes import COCO_CLASSES
from detr_fabric.data.summary import summary
from detr_fabric.errors import UserError
from tests.coco_files import coco, image, thing, write_json


def read(tmp_path: Path, content: Any, categories: Categories | None = None, **options: Any) -> Annotations:
    return read_annotations(write_json(tmp_path / "instances.json", content), categories, **options)


def refusal(tmp_path: Path, content: Any, categories: Categories | None = None, **options: Any) -> str:
    """The one sentence, which names the file."""
    with pytest.raises(UserError) as caught:
        read(tmp_path, content, categories, **options)
    sentence = str(caught.value)
    assert "instances.json" in sentence and "\n" not in sentence and len(sentence) < 400
    return sentence


def test_images_are_in_id_order_and_objects_in_file_order(tmp_path: Path) -> None:
    things = [thing(9, 30, box=[1, 1, 2, 2]), thing(4, 5), thing(2, 30, box=[3, 3, 4, 4]), thing(7, 30, category=2)]
    found = read(tmp_path, coco([image(30), image(7), image(5)], things))
    assert found.image_ids.tolist() == [5, 7, 30]
    assert found.file_names.tolist() == ["5.png", "7.png", "30.png"]
    assert found.boxes[found.objects(2)].tolist() == [[1, 1, 2, 2], [3, 3, 4, 4], [10, 5, 20, 10]]
    assert found.labels[found.objects(2)].tolist() == [0, 0, 1]
    assert found.labels[found.objects(1)].tolist() == []
    assert found.sizes.tolist() == [[30, 40]] * 3


@pytest.mark.parametrize("ids", [(0, 3, 10**12), (5, -2, 1), ("b", "10", "9"), ("ä", "z", "")])
def test_ids_with_gaps_from_zero_huge_negative_or_strings_work(tmp_path: Path, ids: tuple[Any, ...]) -> None:
    content = coco(
        [image(id, file_name=f"{number}.png") for number, id in enumerate(ids)],
        [thing(ids[2], ids[0], category=ids[1]), thing(ids[0], ids[1], category=ids[2])],
        [{"id": id, "name": f"class {id}"} for id in ids],
    )
    found = read(tmp_path, content)
    assert found.image_ids.tolist() == sorted(ids)
    assert found.categories.ids == tuple(sorted(ids))
    place = found.image_ids.tolist().index(ids[1])
    assert [found.categories.id(label) for label in found.labels[found.objects(place)]] == [ids[2]]
    assert found.categories.name(found.categories.label(ids[0])) == f"class {ids[0]}"


def test_missing_area_and_crowd_are_filled_in(tmp_path: Path) -> None:
    things = [thing(1, 1), thing(2, 1, area=7.5), thing(3, 1, iscrowd=1), thing(4, 1, iscrowd=None, area=None)]
    found = read(tmp_path, coco(None, things))
    assert found.areas.tolist() == [200, 7.5, 200, 200]
    assert found.crowd.tolist() == [False, False, True, False]


def test_annotation_ids_may_be_missing(tmp_path: Path) -> None:
    things = [thing(1, 1), thing(2, 9)]
    for entry in things:
        del entry["id"]
    assert "(number 1)" in refusal(tmp_path, coco(None, things)).replace("'", "")
    assert len(read(tmp_path, coco(None, things[:1])).boxes) == 1


def test_no_objects_at_all_and_crowds_only_work(tmp_path: Path) -> None:
    assert len(read(tmp_path, coco(None, [])).boxes) == 0
    assert read(tmp_path, coco(None, [thing(1, 1, iscrowd=1)])).crowd.all()


def test_boxes_without_area_in_the_image_are_dropped_and_counted(tmp_path: Path) -> None:
    boxes = [[1, 1, 0, 5], [1, 1, 5, 0], [1, 1, -3, 5], [40, 5, 9, 9], [-9, 5, 9, 9], [600, 5, 1e-6, 9], [39, 29, 9, 9]]
    found = read(tmp_path, coco(None, [thing(number, 1, box=box) for number, box in enumerate(boxes)]))
    assert found.dropped == 6
    assert found.boxes.tolist() == [[39, 29, 9, 9]]


def test_boxes_are_kept_as_in_the_file_where_the_size_is_unknown(tmp_path: Path) -> None:
    content = coco([{"id": 1, "file_name": "a.png"}], [thing(1, 1, box=[500, 1, 9, 9]), thing(2, 1, box=[5, 1, 0, 9])])
    found = read(tmp_path, content)
    assert found.sizes.tolist() == [[0, 0]]
    assert (found.boxes.tolist(), found.dropped) == ([[500, 1, 9, 9]], 1)


def test_first_images_with_objects_skip_empty_ones_and_crowds(tmp_path: Path) -> None:
    content = coco([image(id) for id in range(6)], [thing(1, 1, iscrowd=1), thing(2, 3), thing(3, 5), thing(4, 5)])
    found = read(tmp_path, content)
    assert found.first(None, with_objects=True) is found
    assert found.first(2, with_objects=False).image_ids.tolist() == [0, 1]
    both = found.first(9, with_objects=True)
    assert both.image_ids.tolist() == [3, 5]
    assert [len(both.boxes[both.objects(index)]) for index in range(2)] == [1, 2]


def test_polygons_do_not_change_what_is_read(tmp_path: Path) -> None:
    plain = read(tmp_path, coco())
    content = coco()
    content["info"] = {"description": 'a "segmentation": [1, 2] in a string'}
    polygons = ([[1.5, 2, -3e-5, 4]], [], [[]], {"counts": [1, 2], "size": [30, 40]}, None, [[1, 2], [3, 4]])
    for entry, polygon in zip(content["annotations"] * 2, polygons, strict=True):
        entry["segmentation"] = polygon
        for indent in (None, 2):
            (tmp_path / "polygons.json").write_text(json.dumps(content, indent=indent))
            found = read_annotations(tmp_path / "polygons.json")
            np.testing.assert_array_equal(found.boxes, plain.boxes)
            np.testing.assert_array_equal(found.image_ids, plain.image_ids)


def test_labels_are_contiguous_in_id_order_or_cocos_own(tmp_path: Path) -> None:
    content = coco(None, [thing(1, 1, category=90)], [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}])
    contiguous = read(tmp_path, content).categories
    assert (contiguous.num_classes, contiguous.label(3), contiguous.label(90)) == (2, 0, 1)
    assert (contiguous.id(1), contiguous.name(1)) == (90, "toothbrush")
    coco91 = read(tmp_path, content, label_space="coco91").categories
    assert (coco91.num_classes, coco91.label(90), coco91.id(3), coco91.name(3)) == (91, 90, 3, "car")
    assert (coco91.id(12), coco91.name(12)) == (12, "N/A")


@pytest.mark.parametrize("id", [0, 91, "cat"])
def test_coco91_refuses_other_ids(tmp_path: Path, id: Any) -> None:
    content = coco(None, [], [{"id": id, "name": "cat"}])
    assert f"({id!r})" in refusal(tmp_path, content, label_space="coco91")


def test_categories_survive_a_checkpoint(tmp_path: Path) -> None:
    for categories in (Categories((1, 7), ("a", "b")), Categories(("x",), ("y",)), Categories((90,), ("t",), "coco91")):
        categories.label(categories.ids[0])  # fills the cached table
        torch.save({"categories": categories.to_dict()}, tmp_path / "c.ckpt")
        state = torch.load(tmp_path / "c.ckpt", weights_only=True)["categories"]
        assert Categories.from_dict(state) == categories == pickle.loads(pickle.dumps(categories))


def test_validation_uses_the_training_categories(tmp_path: Path) -> None:
    training = Categories((2, 5, 8), ("dog", "cow", "cat"))
    content = coco(None, [thing(1, 1, category=8)], [{"id": 8, "name": "cat"}, {"id": 99, "name": "unused"}])
    found = read(tmp_path, content, training)
    assert found.categories is training
    assert found.labels.tolist() == [2]
    content["annotations"].append(thing(2, 1, category=99))
    assert "1 annotations name a category that is not among the categories of the training" in refusal(
        tmp_path, content, training
    )


def test_a_category_with_another_name_than_in_training_is_refused(tmp_path: Path) -> None:
    assert "(2)" in refusal(tmp_path, coco(), Categories((1, 2), ("cat", "horse")))


REFUSED: dict[str, tuple[Any, str]] = {
    "no object": ([], "no JSON object"),
    "no images key": ({"annotations": [], "categories": []}, "no list 'images'"),
    "no annotations key": ({"images": [image(1)], "categories": [{"id": 1, "name": "a"}]}, "no list 'annotations'"),
    "no categories key": ({"images": [image(1)], "annotations": []}, "no list 'categories'"),
    "no images": (coco([], []), "'images' is empty"),
    "no categories": (coco(None, [], []), "'categories' is empty"),
    "entry": (coco([image(1), 5]), r"1 entries of images \(counted from 0\) are no JSON objects \(1\)"),
    "no image id": (coco([{"file_name": "a"}]), r"1 entries of images \(counted from 0\) have no 'id' \(0\)"),
    "no file name": (coco([{"id": 1}]), "have no 'file_name'"),
    "no bbox": (coco(None, [{"image_id": 1, "category_id": 1}]), "have no 'bbox'"),
    "no category name": (coco(None, None, [{"id": 1}]), "have no 'name'"),
    "image twice": (coco([image(1), image(2), image(2), image(1)]), r"2 image ids are used more than once \(1, 2\)"),
    "annotation twice": (coco(None, [thing(4, 1)] * 3), r"1 annotation ids are used more than once \(4\)"),
    "category twice": (coco(None, None, [{"id": 1, "name": "a"}] * 2), r"1 category ids .* more than once \(1\)"),
    "mixed ids": (coco([image(1), image("2")]), r"1 image ids are strings among numbers \('2'\)"),
    "true": (coco([image(True)], []), r"image ids are no whole numbers or strings \(True\)"),
    "float id": (coco([image(1.0)], []), r"image ids are no whole numbers or strings \(1.0\)"),
    "list id": (coco([image([1])], []), "image ids are no whole numbers or strings"),
    "65 bits": (coco([image(2**64)], []), "image ids are no whole numbers or strings"),
    "unknown images": (coco(None, [thing(n, 7) for n in range(5)]), r"5 annotations .* \(0, 1, 2, \.\.\.\)"),
    "unknown category": (coco(None, [thing(3, 1, category=9)]), r"1 annotations name a category .*\(3\)"),
    "string for number": (coco(None, [thing(3, "1")]), r"1 annotations name an image .*\(3\)"),
    "nan": (coco(None, [thing(3, 1, box=[1, 2, float("nan"), 4])]), r"bbox that is not four finite numbers \(3\)"),
    "inf": (coco(None, [thing(3, 1, box=[1, 2, float("inf"), 4])]), r"bbox .*\(3\)"),
    "huge": (coco(None, [thing(3, 1, box=[1, 2, 10**400, 4])]), r"bbox .*\(3\)"),
    "strings": (coco(None, [thing(3, 1, box=["1", "2", "3", "4"])]), r"bbox .*\(3\)"),
    "one string": (coco(None, [thing(1, 1), thing(3, 1, box=[1, 2, "3", 4])]), r"1 annotations .*\(3\)"),
    "booleans": (coco(None, [thing(3, 1, box=[True, 2, 3, 4])]), r"bbox .*\(3\)"),
    "three": (coco(None, [thing(3, 1, box=[1, 2, 3]), thing(4, 1)]), r"1 annotations .*bbox .*\(3\)"),
    "five": (coco(None, [thing(3, 1, box=[1, 2, 3, 4, 5])]), r"bbox .*\(3\)"),
    "no list": (coco(None, [thing(3, 1, box=7)]), r"bbox .*\(3\)"),
    "null": (coco(None, [thing(3, 1, box=None)]), r"bbox .*\(3\)"),
    "crowd": (coco(None, [thing(3, 1, iscrowd="no")]), r"iscrowd .*\(3\)"),
    "area": (coco(None, [thing(3, 1, area="9")]), r"area .*\(3\)"),
    "size": (coco([image(1, width="40"), image(2, height=-1)]), r"2 images have a width or height .*\(1, 2\)"),
    "category name": (coco(None, None, [{"id": 1, "name": 5}]), r"name that is no text \(1\)"),
    "half a character": (coco(None, None, [{"id": 1, "name": "\ud800x"}]), r"name that is no text \(1\)"),
    "absolute": (coco([image(1, file_name="/etc/passwd"), image(2)]), r"1 images have a file_name .*\(1\)"),
    "parent": (coco([image(1), image(2, file_name="a/../../b.jpg")]), r"file_name .*\(2\)"),
    "windows": (coco([image(1, file_name="C:\\b.jpg"), image(2, file_name="..\\b.jpg")]), r"2 images .*file_name"),
    "empty name": (coco([image(1, file_name="")], []), r"file_name .*\(1\)"),
    "zero byte": (coco([image(1, file_name="a\0.jpg")], []), r"file_name .*\(1\)"),
    "surrogate": (coco([image(1, file_name="\ud800.jpg")], []), r"file_name .*\(1\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_content_is_refused_with_ids_and_count(tmp_path: Path, case: str) -> None:
    content, expected = REFUSED[case]
    assert re.search(expected, refusal(tmp_path, content))


def test_a_name_with_two_dots_inside_is_no_parent_folder(tmp_path: Path) -> None:
    names = ["a..b.jpg", "sub/folder/c.jpg", "..d.jpg"]
    content = coco([image(number, file_name=name) for number, name in enumerate(names)], [])
    assert read(tmp_path, content).file_names.tolist() == names


def test_the_first_of_several_faults_is_told_with_the_number_of_the_others(tmp_path: Path) -> None:
    content = coco(None, [thing(1, 1, box="x"), thing(2, 9), thing(3, 1, category=9)])
    sentence = refusal(tmp_path, content)
    assert "1 annotations have a bbox" in sentence
    assert sentence.endswith("; 2 other problems: python -m detr_fabric.check lists all")


def test_the_summary_counts_what_training_clips_drops_and_leaves_out(tmp_path: Path) -> None:
    boxes = [[-2, 5, 20, 10], [30, 25, 12, 4], [30, 25, 10.5, 4], [5, 5, 0, 9], [1, 1, 5, 5], [2, 2, 5, 5]]
    things = [thing(n, 1, box=box) for n, box in enumerate(boxes)] + [thing(9, 2, iscrowd=1)]
    found = read(tmp_path, coco([image(1), image(2), image(3)], things))
    assert summary(found, queries=4) == (
        "5 objects, 1 boxes without area dropped, 2 boxes clipped to their image, 1 crowds left out, "
        "2 images without objects, 1 images with more objects than the 4 queries"
    )
    assert summary(read(tmp_path, coco()), queries=4) == "3 objects"
    unknown = coco([{"id": 1, "file_name": "a.png"}], [thing(1, 1, box=[500, 1, 9, 9])])
    assert summary(read(tmp_path, unknown), queries=4).startswith("1 objects, 1 images of unknown size")


def test_all_problems_are_found_at_once(tmp_path: Path) -> None:
    content = coco(
        [image(1), image(2, file_name="../x.jpg")],
        [thing(1, 1, box="x"), thing(2, 9), thing(3, 1, category=9), thing(4, 1, box=[0, 0, 1, None])],
    )
    annotations, problems = inspect_annotations(write_json(tmp_path / "instances.json", content))
    assert annotations is None
    assert {problem.kind: problem.ids for problem in problems} == {
        "file name": (2,),
        "box": (1, 4),
        "unknown category": (3,),
        "unknown image": (2,),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"images": [1, 2\n, }', r"line 2, column 3"),
        (b'{"annotations": [{"segmentation": [[1, 2], [3]],\n "bbox": [1}]}', r"line 2, column 12"),
        (b'{"images": \xff}', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"images": ' + b"9" * 5000 + b"}", "broken JSON"),
    ],
)
def test_broken_json_is_refused_with_its_position(tmp_path: Path, text: bytes, expected: str) -> None:
    (tmp_path / "instances.json").write_bytes(text)
    with pytest.raises(UserError, match=rf"instances\.json .*{expected}"):
        read_annotations(tmp_path / "instances.json")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            read_annotations(path)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(
        [0, 1, 2, -1, 2**63, 10**400, "1", "../a", "/a", [], {}, [1, 2, 3, 4], float("nan"), "\ud800", "\0"]
    ),
    st.lists(st.one_of(st.integers(-50, 50), st.floats(), st.text(max_size=2)), max_size=5),
).map(copy.deepcopy)  # lists and objects are changed later


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A COCO file with a few entries, keys or bytes changed."""
    content: Any = copy.deepcopy(coco())
    for _ in range(draw(st.integers(1, 4))):
        table = content[draw(st.sampled_from(["images", "annotations", "categories"]))]
        if not table:
            continue
        row = draw(st.integers(0, len(table) - 1))
        action = draw(st.sampled_from(["set", "set", "set", "add", "remove", "repeat", "replace", "drop"]))
        keys = ["id", "file_name", "width", "height", "image_id", "category_id", "bbox", "area", "iscrowd", "name"]
        if action == "repeat":
            table.append(copy.deepcopy(table[row]))
        elif action == "drop":
            del table[row]
        elif action == "replace" or not isinstance(table[row], dict) or not table[row]:
            table[row] = draw(VALUES)
        elif action == "add":
            table[row][draw(st.sampled_from(keys))] = draw(VALUES)
        else:
            key = draw(st.sampled_from(sorted(table[row])))
            if action == "remove":
                del table[row][key]
            else:
                table[row][key] = draw(VALUES)
    text = bytearray(json.dumps(content).encode())
    if draw(st.integers(0, 3)) == 0:
        for _ in range(draw(st.integers(1, 3))):
            text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    return bytes(text)


@pytest.mark.process
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutated(), st.sampled_from(["contiguous", "coco91"]), st.booleans())
def test_any_file_loads_or_is_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, label_space: Any, validation: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(text)
    categories = Categories((1, 2), ("cat", "dog")) if validation else None
    try:
        found = read_annotations(path, categories, label_space)
    except UserError as error:
        assert "fuzz.json" in str(error) and "\n" not in str(error)
        str(error).encode()
        return
    rows = json.loads(text)["annotations"]
    assert len(found.boxes) + found.dropped == len(rows), "an annotation vanished"
    assert found.offsets[-1] == len(found.boxes) == len(found.labels) == len(found.areas) == len(found.crowd)
    assert np.isfinite(found.boxes).all() and np.isfinite(found.areas).all()
    assert len(set(found.image_ids.tolist())) == len(found) > 0
    assert ((found.labels >= 0) & (found.labels < found.categories.num_classes)).all()


def test_coco_classes_are_those_of_the_annotations(coco_mini: Path) -> None:
    content = json.loads((coco_mini / "annotations" / "instances_train2017.json").read_text())
    assert {row["id"]: row["name"] for row in content["categories"]} == COCO_CLASSES
    assert len(COCO_CLASSES) == 80 and list(COCO_CLASSES) == sorted(COCO_CLASSES)
