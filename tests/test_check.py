"""The check of a data set: finds what training refuses, nothing else, mends it, and dies of no file."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import pty
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import DAMAGE, coco, image, thing, write_images, write_json, write_root
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import environment, python

from detr_fabric import check, progress
from detr_fabric.check import Settings, run
from detr_fabric.data import decoding
from detr_fabric.data import images as image_files
from detr_fabric.data.annotations import read_annotations
from detr_fabric.data.categories import Categories
from detr_fabric.data.repair import Finding, repair
from detr_fabric.errors import UserError


def checked(*args: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        check.main([str(arg) for arg in args])
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def found(report: str) -> dict[str, tuple[str, int, str]]:
    """What was found → what training does, number of entries, and the entries."""
    rows = re.findall(r"^  (refuses|stops|drops|clips|keeps) +([\d,]+)  (.*?)(?:  .*)?\n((?: {19}.*\n)*)", report, re.M)
    return {
        what.strip(): (training, int(count.replace(",", "")), " ".join(ids.split()))
        for training, count, what, ids in rows
    }


def clean() -> dict[str, Any]:
    """A data set of which there is nothing to say."""
    return coco(None, [thing(1, 1), thing(2, 2, category=2), thing(3, 1, box=[1, 2, 3, 4])])


# What is found


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
        "categories whose name is no string": ("refuses", 1, "2"),
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
        "annotations whose area is no finite number": ("refuses", 1, "6"),
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
    categories = [{"id": 1, "name": "\x1b[31mred\nline"}, {"id": 2, "name": "\ud800"}, {"id": 3, "name": "猫"}]
    code, report, _ = checked(write_json(tmp_path / "a.json", coco(None, [], categories)))
    assert code == 0
    assert r"\x1b[31mred\nline" in report and r"\ud800" in report and "猫" in report and "\x1b" not in report


# Statistics


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
    assert lines["classes"] == f"3, most objects: c1 {ones}, c2 {114 - ones}, c3 0"
    assert lines["fewer than 50 objects"] == f"1 classes: c2 {114 - ones}"
    assert lines["no objects"] == "1 classes: c3"


# Image files


def broken_images(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """One image of each fault with ids 1, 2, …, id 0 being fine; and what is expected of each file."""
    names = ["good", *DAMAGE, "png cut", "folder", "pipe"]
    content = coco(
        [image(number, file_name=f"{name}.jpg") for number, name in enumerate(names)],
        [thing(number, number) for number in range(len(names))],
    )
    write_images(folder, content)
    path = {name: folder / f"{name}.jpg" for name in names}
    for name, damage in DAMAGE.items():
        damage(path[name])
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(path["png cut"], "PNG")
    path["png cut"].write_bytes(path["png cut"].read_bytes()[:1500])
    for name in ("folder", "pipe"):
        path[name].unlink()
    path["folder"].mkdir()
    os.mkfifo(path["pipe"])  # reading it would wait for ever
    return content, {
        "missing": "missing",
        "empty": "empty",
        "truncated": "damaged or not supported",
        "web page": "no JPEG, PNG, WEBP, BMP, TIFF or GIF image",
        "other size": "another size than its entry",
        "bomb": f"more than {image_files.MAX_PIXELS} pixels",
        "png cut": "damaged or not supported",
        "folder": "a folder or a device",
        "pipe": "a folder or a device",
    }


@pytest.mark.parametrize("workers", [1, 3])
def test_every_broken_file_is_listed_and_left_out_of_the_copy(tmp_path: Path, workers: int) -> None:
    content, expected = broken_images(tmp_path / "images")
    source, out = write_json(tmp_path / "a.json", content), tmp_path / "out.json"
    code, report, _ = checked(source, "--images", tmp_path / "images", "--workers", workers)
    assert code == 1
    listed = {what: entry for what, entry in found(report).items() if what.startswith("images")}
    for number, image_entry in enumerate(content["images"]):
        fault = expected.get(image_entry["file_name"].removesuffix(".jpg"))
        naming = [what for what, (_, _, entries) in listed.items() if f"{number} {tmp_path}" in entries]
        assert len(naming) == (fault is not None)
        assert fault is None or fault in naming[0]
    assert all(training == "stops" for training, _, _ in listed.values())
    assert "(40 x 30" not in report and "(30 x 40 in the file, 40 x 30 in its entry)" in report
    assert found(report)["annotations of images at which training stops"][1] == len(expected)

    assert checked(source, "--images", tmp_path / "images", "--workers", workers, "--fix", out)[0] == 0
    assert read_annotations(out).image_ids.tolist() == [0]
    code, report, _ = checked(out, "--images", tmp_path / "images", "--workers", workers)
    assert (code, found(report)) == (0, {})


def test_a_file_that_kills_its_decoder_is_named_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = coco([image(number) for number in range(12)], [])
    folder = write_images(tmp_path / "images", content)
    decode = image_files.read_image

    def deadly(path: Path) -> Any:
        if path.stem in ("4", "9"):
            os.kill(os.getpid(), signal.SIGKILL)  # SIGSEGV would do the same, loudly
        return decode(path)

    monkeypatch.setattr(image_files, "read_image", deadly)
    for workers in ("1", "3", "20"):
        args = (write_json(tmp_path / "a.json", content), "--images", folder, "--workers", workers)
        code, report, _ = checked(*args)
        assert code == 1
        fault = ("stops", 2, f"4 {folder}/4.png 9 {folder}/9.png")
        assert found(report) == {"images whose file kills its decoder": fault}


def test_sizes_that_entries_lack_come_from_the_files(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", clean())
    content = coco(
        [{"id": 1, "file_name": "1.png"}, image(2, height="30")], [thing(1, 1, box=[40, 0, 9, 9]), thing(2, 2)]
    )
    source, out = write_json(tmp_path / "a.json", content), tmp_path / "out.json"
    report = checked(source, "--images", folder, "--workers", "1", "--fix", out)[1]
    assert found(report)["annotations whose box has no area in its image"] == ("drops", 1, "1")
    assert read_annotations(out).sizes.tolist() == [[30, 40]] * 2
    assert "annotations whose box has no area" not in checked(source)[1]


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def test_damaged_images_give_an_image_or_a_fault_and_never_kill(tmp_path: Path) -> None:
    rng = random.Random(5)
    y, x = np.mgrid[:30, :40]
    picture = Image.fromarray(np.stack([x * 6, y * 8, x * y % 251], -1).astype(np.uint8))
    folder, names = tmp_path / "images", []
    folder.mkdir()
    for kind in FORMATS:
        for variant in ({}, {"compression": "tiff_lzw"} if kind == "TIFF" else {"optimize": True}):
            buffer = io.BytesIO()
            picture.save(buffer, kind, **variant)
            data = buffer.getvalue()
            for number in range(25):
                damaged = bytearray(data)
                if number % 2:
                    damaged = damaged[: rng.randrange(len(data))]
                for _ in range(rng.randint(1, 6)):
                    if damaged:
                        damaged[rng.randrange(min(len(damaged), rng.choice([64, len(data)])))] = rng.randrange(256)
                names.append(f"{kind}-{len(names)}.jpg")
                (folder / names[-1]).write_bytes(damaged)
    assert len(names) == 300

    content = coco([{"id": number, "file_name": name} for number, name in enumerate(names)], [])
    results = decoding.read_sizes(folder, content["images"], 2, lambda done: None)
    faults = [result for result in results if isinstance(result, decoding.FileFault)]
    assert 100 < len(faults) < 300 and not any("kills" in fault.kind for fault in faults)
    for name, result in zip(names, results, strict=True):  # none killed its process: this one is safe, too
        try:
            assert tuple(image_files.read_image(folder / name).shape[-2:]) == result
        except UserError as error:
            assert isinstance(result, decoding.FileFault) and "\n" not in str(error)


# The copy


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
        assert repaired.content is not None
        assert [row["id"] for row in repaired.content["annotations"]] == expected


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


# Both parts, and validation beside training


def test_both_parts_of_a_root_are_checked_and_validation_uses_the_training_categories(tmp_path: Path) -> None:
    val = coco(None, None, [{"id": 1, "name": "cat"}, {"id": 2, "name": "horse"}])
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


# The command


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "ANNOTATIONS.json, or --root"),
        (["gone.json"], "gone.json is no file"),
        (["."], "is no file"),
        (["a.json", "--images", "gone"], "gone is no folder"),
        (["a.json", "--root", "."], "--root goes without"),
        (["--root", ".", "--fix", "b.json"], "--root goes without"),
        (["--root", "gone"], "instances_train2017.json is no file"),
        (["a.json", "--annotations-only"], "--annotations-only goes with --root"),
        (["a.json", "--fix", "."], "is a folder"),
        (["a.json", "--fix", "gone/b.json"], "in a folder that exists"),
        (["a.json", "--queries", "0"], "1 or more"),
        (["a.json", "--workers", "0"], "1 or more"),
        (["a.json", "--show", "-1"], "0 or more"),
        (["a.json", "--train-annotations", "gone.json"], "gone.json does not exist"),
        (["a.json", "--train-annotations", "broken.json"], "broken.json is broken JSON"),
        (["a.json", "--nonsense"], "--nonsense"),
        (["a.json", "b.json"], "b.json"),
        (["a.json", "--label-space", "coco"], "contiguous"),
    ],
)
def test_wrong_commands_end_with_2_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "a.json", clean())
    (tmp_path / "broken.json").write_text("{")
    code, report, error = checked(*args)
    assert code == 2 and expected in " ".join(error.replace("│", "").split()) and "not accept" not in report


def test_help_explains_everything_and_annotations_are_checked_without_torch(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", clean())
    script = (
        "import sys; from detr_fabric import check\n"
        "try: check.main(sys.argv[1:])\n"
        "except SystemExit as end: print('code', end.code, 'torch' in sys.modules)"
    )
    assert "code 0 False" in python("-c", script, str(path), "--fix", "out.json", cwd=tmp_path).stdout
    text = python("-c", script, "--help", cwd=tmp_path).stdout
    assert "code 0 False" in text
    for word in (
        "Exit code: 0",
        "ANNOTATIONS.json",
        "refuses",
        "written by --fix",
        "--images FOLDER",
        "--queries INT",
    ):
        assert word in text


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = write_json(tmp_path / "a.json", clean()), write_images(tmp_path / "images", clean())
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    assert checked(path, "--images", folder, "--workers", "1")[2] == "  1 of 2 images\n  2 of 2 images\n"
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as terminal, contextlib.redirect_stdout(io.StringIO()), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert run(Settings(str(path), str(folder), workers=1))
    assert "2/2" in os.read(parent, 10_000).decode()
    os.close(parent)


def test_a_closed_pipe_and_ctrl_c_end_it_without_a_traceback_or_an_orphan(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)).save(tmp_path / "a.jpg")
    content = coco([{"id": n, "file_name": "a.jpg"} for n in range(3000)], [])
    path = write_json(tmp_path / "a.json", content)
    code = "import sys; from detr_fabric import check, progress; progress.LINE_SECONDS = 0; check.main(sys.argv[1:])"
    args = [sys.executable, "-c", code, str(path), "--images", str(tmp_path), "--workers", "2"]
    with subprocess.Popen(
        args, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "of 3,000 images" in process.stderr.readline()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    piped = subprocess.run(
        [
            "bash",
            "-c",
            '"$0" -m detr_fabric.check "$1" --show 0 | true; echo "code ${PIPESTATUS[0]}"',
            sys.executable,
            path,
        ],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert piped.stderr == "" and "code 1" in piped.stdout


# Fuzzed files, beside a slow account of the rules

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 6),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([2**62, 2**63, -(2**63), 10**400, 1.0, 40, 30.0, 1e9, 1e300, float("nan"), float("-inf")]),
    st.sampled_from(["1", "2", "a.png", "../a", "/a", "c:a", "a\\..\\b", "\ud800", "\0", "cat", "dog", "a" * 5000]),
    st.sampled_from([[], {}, [1, 2, 3, 4], [0, 0, 0, 0], [1, 2, "3", 4], [39.9999999, 1, 1e-9, 5], [[1]], {"id": 1}]),
    st.lists(st.one_of(st.integers(-50, 50), st.floats(-60, 60), st.floats()), min_size=4, max_size=4),
).map(copy.deepcopy)  # lists and objects are changed later
KEYS = ["id", "file_name", "width", "height", "image_id", "category_id", "bbox", "area", "iscrowd", "name"]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A data set in which a few entries, keys or tables were changed, repeated, mixed up or removed."""
    content: Any = coco(
        [image(n) for n in range(1, 5)],
        [thing(n, 1 + n % 4, (n, 5, 20, 10), 1 + n % 2) for n in range(1, 9)],
        [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}],
    )
    for row in content["annotations"]:
        row["bbox"] = list(row["bbox"])
    for _ in range(draw(st.integers(0, 8))):
        name = draw(st.sampled_from(["images", "annotations", "annotations", "annotations", "categories"]))
        table = content[name]
        if not isinstance(table, list) or not table:
            continue
        row = draw(st.integers(0, len(table) - 1))
        action = draw(
            st.sampled_from(["set"] * 6 + ["key", "remove", "repeat", "repeat", "replace", "drop", "strings", "table"])
        )
        entry = table[row]
        if action == "table" and draw(st.integers(0, 9)) == 0:
            content[name] = draw(VALUES)
        elif action == "repeat":
            table.insert(draw(st.integers(0, len(table))), copy.deepcopy(entry))
        elif action == "drop":
            del table[row]
        elif action == "replace":
            table[row] = draw(VALUES)
        elif action == "strings":  # all ids of a table, as some tools write them
            for other in table:
                if isinstance(other, dict):
                    other["id"] = str(other.get("id"))[:40]
        elif isinstance(entry, dict) and entry:
            key = draw(st.sampled_from(KEYS if action == "key" else sorted(entry)))
            if action == "remove":
                entry.pop(key, None)
            else:
                entry[key] = draw(VALUES)
    return content


def is_id(id: Any) -> bool:
    return (type(id) is int and -(2**63) < id < 2**63) or (type(id) is str and "\0" not in id)


def own_ids(rows: list[Any], keys: tuple[str, ...]) -> list[bool]:
    """Whether each row has all keys and a proper id, of the more frequent kind, that no earlier row had."""
    whole = [isinstance(row, dict) and all(key in row for key in keys) for row in rows]
    proper = [ok and is_id(row["id"]) for row, ok in zip(rows, whole, strict=True)]
    strings = sum(type(row["id"]) is str for row, ok in zip(rows, proper, strict=True) if ok)
    kind = str if strings > sum(proper) - strings else int
    seen: set[Any] = set()
    result = []
    for row, ok in zip(rows, proper, strict=True):
        result.append(ok and type(row["id"]) is kind and row["id"] not in seen)
        if result[-1]:
            seen.add(row["id"])
    return result


def is_number(value: Any, limit: float) -> bool:
    return type(value) in (int, float) and abs(value) < limit


def known_side(value: Any) -> float:
    return value if is_number(value, 1e9) and value >= 1 and value == int(value) else 1e9


def survivors(content: dict[str, Any], training: Categories | None, coco91: bool) -> list[int] | None:
    """Which annotations the copy keeps; None if there is no copy."""
    tables = [content.get(name) for name in ("images", "categories", "annotations")]
    if not all(isinstance(table, list) for table in tables):
        return None
    images, categories, things = tables
    sizes = {}
    for row, own in zip(images, own_ids(images, ("id", "file_name")), strict=True):
        name = row["file_name"] if own else None
        bad = not isinstance(name, str) or not 0 < len(name) < 4096 or name[0] in "/\\" or name[1:2] == ":"
        if not bad and ".." not in name.replace("\\", "/").split("/") and not {"\0", "\ud800"} & set(name):
            sizes[row["id"]] = known_side(row.get("width")), known_side(row.get("height"))
    names, refused = {}, set()
    for row, own in zip(categories, own_ids(categories, ("id", "name")), strict=True):
        if not own:
            continue
        name = row["name"] if isinstance(row["name"], str) else json.dumps(row["name"])
        wanted = dict(zip(training.ids, training.names, strict=True)).get(row["id"], name) if training else name
        if name != wanted:
            refused.add(row["id"])
        elif training or not coco91 or (type(row["id"]) is int and 0 < row["id"] < 91):
            names[row["id"]] = name
    if not sizes or not names:
        return None
    known = set(training.ids) - refused if training else set(names)
    whole = [isinstance(row, dict) and {"image_id", "category_id", "bbox"} <= set(row) for row in things]
    first = own_ids([row if ok else None for row, ok in zip(things, whole, strict=True)], ("id",))
    kept = []
    for number, row in enumerate(things):
        if not whole[number] or not all(is_id(row[key]) for key in ("image_id", "category_id")):
            continue
        earlier = [things[n] for n in range(number) if first[n] and things[n]["id"] == row.get("id")]
        if not first[number] and is_id(row.get("id")) and row in earlier:
            continue
        if row["image_id"] not in sizes or row["category_id"] not in known:
            continue
        box = row["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(is_number(value, 1e9) for value in box):
            continue
        x, y, w, h = map(np.float32, box)
        right, bottom = (np.float32(limit) for limit in sizes[row["image_id"]])
        if np.clip(x + w, 0, right) > np.clip(x, 0, right) and np.clip(y + h, 0, bottom) > np.clip(y, 0, bottom):
            kept.append(number)
    return kept


TRAINING = Categories((1, 2, 3), ("cat", "dog", "bird"))


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutated(), st.sampled_from(["contiguous", "contiguous", "coco91", "validation"]))
def test_any_file_is_accounted_for_and_its_copy_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any], use: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    source, out, training_file = folder / "in.json", folder / "out.json", folder / "train.json"
    write_json(source, content)
    if not training_file.exists():
        names = zip(TRAINING.ids, TRAINING.names, strict=True)
        write_json(training_file, coco(None, [], [{"id": id, "name": name} for id, name in names]))
    out.unlink(missing_ok=True)
    before = source.read_bytes()
    content = json.loads(before)
    training, label_space = (TRAINING, "contiguous") if use == "validation" else (None, use)

    options = {"label_space": label_space, "show": 0}
    if training is not None:
        options["train_annotations"] = str(training_file)
    with contextlib.redirect_stdout(io.StringIO()) as report:
        accepted = run(Settings(str(source), **options))
        mended = run(Settings(str(source), fix=str(out), **options))
    report.getvalue().encode()
    assert source.read_bytes() == before
    try:
        read_annotations(source, training, label_space)
        assert accepted, "training accepts what the check refuses"
    except UserError:
        assert not accepted, "training refuses what the check accepts"

    expected = survivors(content, training, use == "coco91")
    assert mended == out.exists() == (expected is not None)
    if expected is None:
        return
    things = content["annotations"]
    found = read_annotations(out, training, label_space)
    rows = {}  # image id → boxes with categories, in the file's order
    for number in expected:
        row = things[number]
        rows.setdefault(row["image_id"], []).append((row["category_id"], *map(float, row["bbox"])))
    for index, id in enumerate(found.image_ids.tolist()):
        part = found.objects(index)
        categories = [found.categories.id(label) for label in found.labels[part]]
        ours = [(category, *box) for category, box in zip(categories, found.boxes[part].tolist(), strict=True)]
        assert ours == rows.pop(id, [])
    assert not rows and found.dropped == 0

    repaired = repair(content, training, label_space)
    assert repaired.rows["annotations"] == (len(things), len(expected))
    listed = Counter(entry for finding in dropping(repaired.findings) for entry in finding.entries)
    for number in set(range(len(things))) - set(expected):
        has_id = isinstance(things[number], dict) and "id" in things[number]
        name = ascii(things[number]["id"]) if has_id else f"number {number}"
        assert listed[name if len(name) <= 40 else name[:37] + "..."] > 0, "an annotation was dropped in silence"
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(Settings(str(out), **options)), "the copy's own check"


def dropping(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.what.startswith("annotations") and finding.copy == "drops"]
