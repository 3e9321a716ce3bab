"""The check finds what training refuses, drops, clips or keeps, and nothing else; its statistics are right."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.checking import checked, clean, found
from tests.coco_files import coco, image, thing, write_images, write_json


def test_a_clean_data_set_is_accepted_and_nothing_is_found(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", clean())
    write_images(tmp_path / "images", clean())
    code, report, _ = checked(path, "--images", tmp_path / "images", "--workers", "1")
    assert (code, found(report)) == (0, {})
    assert "training accepts it\n" in report
    assert "image files were not looked at" in checked(path)[1]


def test_every_fault_is_listed_with_ids_and_what_training_does(tmp_path: Path) -> None:
    content = coco(
        [
            image(1),
            image(2),
            image(2),
            image(2, width=50),
            image("x"),
            image(3, file_name="../a"),
            5,
            image(4, width=-1),
        ],
        [
            thing(1, 1),
            thing(1, 1),  # the same again
            thing(1, 2),  # another one with its id
            thing(2, 99),
            thing(3, 3),
            thing(4, 1, box=[1, 2, float("nan"), 4], category=7),
            thing(5, 1, iscrowd="no"),
            thing(6, 2, area="big"),
            thing(7, 2, box=[5, 5, 0, 3]),
            thing(8, 2, box=[30, 3, 12, 8]),
            thing(9, 2, box=[30, 3, 12, 8]),
            {"id": 10, "image_id": 1},
            {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]},
        ],
        [{"id": 1, "name": "cat"}, {"id": 2, "name": 5}, {"id": 6, "name": "cat"}],
    )
    code, report, _ = checked(write_json(tmp_path / "a.json", content))
    assert code == 1
    assert found(report) == {
        "categories whose name is no text": ("refuses", 1, "2"),
        "categories with the name of an earlier one": ("keeps", 1, "6"),
        "images that are no JSON objects": ("refuses", 1, "number 6"),
        "images that repeat an earlier one entirely": ("refuses", 1, "2"),
        "images with the id of an earlier one": ("refuses", 1, "2"),
        "images whose id is a string among numbers": ("refuses", 1, "'x'"),
        "images whose file_name is no path inside the image folder": ("refuses", 1, "3"),
        "images whose width or height is no positive whole number": ("refuses", 1, "4"),
        "annotations without 'category_id'": ("refuses", 1, "10"),
        "annotations without 'bbox'": ("refuses", 1, "10"),
        "annotations that repeat an earlier one entirely": ("refuses", 1, "1"),
        "annotations with the id of an earlier one": ("refuses", 1, "1"),
        "annotations of an unknown image": ("refuses", 1, "2"),
        "annotations of a dropped image": ("refuses", 1, "3"),
        "annotations of an unknown category": ("refuses", 1, "4"),
        "annotations whose bbox is not four finite numbers": ("refuses", 2, "4, number 12"),
        "annotations whose iscrowd is not 0 or 1": ("refuses", 1, "5"),
        "annotations whose area is no number from 0 to 1e+10": ("refuses", 1, "6"),
        "annotations whose box has no area in its image": ("drops", 1, "7"),
        "annotations whose box leaves its image by more than 1 pixel": ("clips", 2, "8, 9"),
        "annotations with image, class and box of an earlier one": ("keeps", 3, "5, 6, 9"),
    }
    assert "13  annotations, 7 of them not usable" in report and "training does not accept it" in report


def test_more_ids_than_shown_are_counted_and_can_be_shown(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", coco(None, [thing(n, 9) for n in range(100, 1300)]))
    _, report, _ = checked(path, "--show", "2")
    assert found(report) == {
        "annotations of an unknown image": ("refuses", 1200, "100, 101 and 1,198 more (--show 0 names all)")
    }
    assert "1,200  annotations of" in report
    ids = found(checked(path, "--show", "0")[1])["annotations of an unknown image"][2]
    assert ids.split(", ") == [str(n) for n in range(100, 1300)]


def test_an_id_that_many_entries_share_is_named_once(tmp_path: Path) -> None:
    things = [thing(5, 1, box=[n, 0, 5, 5]) for n in range(30)]
    report = checked(write_json(tmp_path / "a.json", coco(None, things)))[1]
    assert found(report) == {"annotations with the id of an earlier one": ("refuses", 29, "5")}


def test_images_with_more_objects_than_queries_are_named_and_accepted(tmp_path: Path) -> None:
    things = [thing(n, 1, box=[n, 0, 5, 5]) for n in range(4)] + [
        thing(9, 2),
        thing(10, 2, box=[0, 0, 1, 1], iscrowd=1),
    ]
    path = write_json(tmp_path / "a.json", coco(None, things))
    code, report, _ = checked(path, "--queries", "3")
    assert code == 0
    assert found(report) == {"images with more objects than 3 queries": ("keeps", 1, "1")}
    assert found(checked(path, "--queries", "4")[1]) == {}


@pytest.mark.parametrize(
    ("boxes", "doubt"),
    [([[20, 10, 35, 25], [22, 12, 30, 20]], "corners"), ([[0.2, 0.1, 0.5, 0.5]], "fractions"), ([[1, 1, 9, 9]], None)],
)
def test_boxes_in_another_format_are_suspected(tmp_path: Path, boxes: list[list[float]], doubt: str | None) -> None:
    things = [thing(number, 1, box=box) for number, box in enumerate(boxes)]
    code, report, _ = checked(write_json(tmp_path / "a.json", coco(None, things)))
    assert code == 0
    assert [word for word in ("corners", "fractions") if word in report] == ([doubt] if doubt else [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "is empty"),
        (b'{"images": [1, 2\n, }', "line 2, column 3"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"images": []}', "2  lists are missing from the file"),
        (b'{"images": [], "annotations": [], "categories": []}', "2  lists have no usable entry"),
    ],
)
def test_files_of_which_nothing_can_be_saved_are_not_accepted(tmp_path: Path, text: bytes, expected: str) -> None:
    (tmp_path / "a.json").write_bytes(text)
    code, report, _ = checked(tmp_path / "a.json", "--fix", tmp_path / "out.json")
    assert code == 1 and expected in report
    assert os.listdir(tmp_path) == ["a.json"]


def test_names_from_the_file_cannot_control_the_terminal(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "\x1b[31mred\nline"}, {"id": 2, "name": "\u202e"}, {"id": 3, "name": "猫"}]
    code, report, _ = checked(write_json(tmp_path / "a.json", coco(None, [thing(1, 1)], categories)))
    assert code == 0
    assert r"\x1b[31mred\nline" in report and r"\u202e" in report and "猫" in report and "\x1b" not in report


def test_statistics_are_those_of_a_slow_count(tmp_path: Path) -> None:
    rng = random.Random(1)
    images = [image(n, width=rng.choice([300, 400]), height=rng.choice([200, 300])) for n in range(30)]
    things = []
    for n in range(120):
        w, h = rng.uniform(1, 190), rng.uniform(1, 190)
        things.append(
            thing(n, rng.randrange(25), [0, 0, w, h], rng.choice([1, 1, 1, 2]), area=w * h, iscrowd=n % 20 == 0)
        )
    path = write_json(tmp_path / "a.json", coco(images, things, [{"id": n, "name": f"c{n}"} for n in (1, 2, 3)]))
    report = checked(path, "--queries", "6")[1]
    lines = {line[:26].strip(): line[26:] for line in report.splitlines()}

    objects = [row for row in things if not row["iscrowd"]]
    per_image = [sum(row["image_id"] == n for row in objects) for n in range(30)]
    assert lines["images"] == f"30, {per_image.count(0)} of them without objects"
    assert lines["objects"] == "114, and 6 crowds, which are not trained on"
    assert lines["above 6 queries"] == f"{sum(count > 6 for count in per_image)} images"
    assert lines["objects per image"].startswith(f"median {sorted(per_image)[15]:.0f},")
    assert lines["objects per image"].endswith(f"to {max(per_image)}")
    areas = [row["area"] for row in objects]
    small, large = (sum(map(test, areas)) / 114 for test in (lambda a: a < 1024, lambda a: a >= 9216))
    assert lines["areas by COCO's limits"] == f"small {small:.1%}, medium {1 - small - large:.1%}, large {large:.1%}"
    sides = [math.sqrt(r["area"] / (images[r["image_id"]]["width"] * images[r["image_id"]]["height"])) for r in objects]
    assert lines["box side / image side"].endswith(f"all in {min(sides):.3f} to {max(sides):.3f}")
    ratios = [row["width"] / row["height"] for row in images]
    assert lines["width / height"].endswith(f"all in {min(ratios):.2f} to {max(ratios):.2f}")
    (width, height), times = Counter((row["width"], row["height"]) for row in images).most_common(1)[0]
    assert lines["most frequent size"] == f"{width} x {height}, {times / 30:.0%} of the images"
    ones = sum(row["category_id"] == 1 for row in objects)
    assert lines["classes"] == f"3, most objects: c1 {ones}, c2 {114 - ones}"
    assert lines["fewer than 50 objects"] == f"1 class: c2 {114 - ones}"
    assert lines["no objects"] == "1 class: c3"
