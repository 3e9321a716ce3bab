"""Predictions are a file that COCO's tools take, with ids of their own or those of an annotation file."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_fabric.data.formats.categories import Categories
from detr_fabric.errors import UserError
from detr_fabric.evaluate import __main__ as evaluate
from detr_fabric.predict.coco import ids_of_file, image_places, own_ids
from detr_fabric.predict.paths import ImageFile
from tests.coco_files import coco, image, thing, write_json
from tests.predict.small import PETS, results, run, write_checkpoint, write_image

NAMED = Categories(("cat", "dog"), ("cat", "dog"))  # as Pascal VOC's, whose ids are names


def files(*names: str) -> list[ImageFile]:
    return [ImageFile(Path("photos") / name, name) for name in names]


def test_image_ids_are_the_numbers_that_all_files_are_called_by_else_counted() -> None:
    assert own_ids(files("000000000139.jpg", "a/7.png"), PETS).images == [139, 7]
    for names in (("1.jpg", "x.jpg"), ("3.jpg", "03.jpg"), ("5.jpg", "²3.jpg")):
        assert own_ids(files(*names), PETS).images == [1, 2]


def test_category_ids_are_those_of_training_or_counted_where_these_are_names() -> None:
    assert own_ids(files("a.jpg"), PETS).categories == {0: 7, 1: 42}
    assert own_ids(files("a.jpg"), NAMED).categories == {0: 1, 1: 2}
    official = own_ids(files("a.jpg"), Categories((1, 90), ("person", "toothbrush"), "coco91")).categories
    assert (official[1], official[90]) == (1, 90)


def test_an_annotated_name_ends_the_path_of_its_file() -> None:
    names = ["a/1.jpg", "b/1.jpg", "2.jpg", "train\\3.jpg", "x/4.jpg", "y/4.jpg"]
    given = [ImageFile(Path(path), Path(path).name) for path in ("/d/b/1.jpg", "/d/2.jpg", "/d/3.jpg", "/d/4.jpg")]
    assert image_places(names, given) == [1, 2, 3, None]  # the last could be either
    assert image_places(names, files("a/1.jpg", "c/1.jpg", "none.jpg")) == [0, None, None]


@pytest.fixture
def content() -> dict[str, Any]:
    """Of numbered files, whose ids in the annotations are others; a dog or a cat fills the middle of each."""
    images = [image(n, width=90, height=60, file_name=f"{13 - n}.png") for n in range(1, 13)]
    objects = [thing(n, n, (22 + n, 15, 45, 30), 5 if n % 3 else 9) for n in range(1, 13)]
    objects = [row | {"area": 45 * 30, "iscrowd": 0} for row in objects]
    return coco(images, objects, [{"id": 5, "name": "dog"}, {"id": 9, "name": "cat"}, {"id": 42, "name": "bird"}])


def test_pycocotools_scores_predictions_as_evaluation_does(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    for entry in content["images"]:
        write_image(tmp_path / "images" / entry["file_name"])
    write_image(tmp_path / "images" / "99.png")
    annotations = write_json(tmp_path / "instances.json", content)
    file = write_checkpoint(tmp_path / "best.ckpt", NAMED)
    stored = torch.load(file, weights_only=True)
    stored["model"]["bbox_embed.layers.2.bias"] = torch.tensor([0.0, 0.0, 0.0, 0.0])  # boxes near the middle
    stored["model"]["bbox_embed.layers.2.weight"] *= 0.3
    torch.save(stored, file)

    args = (file, tmp_path / "images", "--threshold", "0", "--out", tmp_path / "out", "--accelerator", "cpu")
    assert run(monkeypatch, *args, "--no-pictures", "--annotations", annotations) == 0
    rows = results(tmp_path / "out")
    assert {(row["image_id"], row["file_name"]) for row in rows} == {(n, f"{13 - n}.png") for n in range(1, 13)}
    assert {(row["category_id"], row["category"]) for row in rows} <= {(5, "dog"), (9, "cat")}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        scored = COCOeval(truth, truth.loadRes(str(tmp_path / "out" / "predictions.json")), "bbox")
        for step in (scored.evaluate, scored.accumulate, scored.summarize):
            step()
    data = ("--data.val-images", tmp_path / "images", "--data.val-annotations", annotations, "--accelerator", "cpu")
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, (file, *data, "--out", tmp_path / "scores.json"))])
    evaluate.main()
    ap = json.loads((tmp_path / "scores.json").read_text())["AP"]
    assert ap > 0.01 and scored.stats[0] == pytest.approx(ap, abs=1e-6)


def test_predictions_of_data_with_names_as_ids_are_whole_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_checkpoint(tmp_path / "best.ckpt", NAMED)
    write_image(tmp_path / "in" / "b.png")
    write_image(tmp_path / "in" / "a.png")
    args = (file, tmp_path / "in", "--out", tmp_path / "out", "--accelerator", "cpu", "--no-pictures")
    assert run(monkeypatch, *args, "--threshold", "0") == 0
    for row in results(tmp_path / "out"):
        assert row["file_name"] == ["a.png", "b.png"][row["image_id"] - 1]
        assert row["category"] == ["cat", "dog"][row["category_id"] - 1]
        assert row["area"] == pytest.approx(row["bbox"][2] * row["bbox"][3])
    best = max(row["score"] for row in results(tmp_path / "out"))
    capsys.readouterr()
    assert run(monkeypatch, *args, "--threshold", "1") == 0
    assert f"the best score there was is {best:.3f}: see what --threshold {int(best * 100) / 100:g} finds" in (
        capsys.readouterr().out
    )


def test_annotations_that_give_no_ids_are_refused_with_the_reason(content: dict[str, Any], tmp_path: Path) -> None:
    def refusal(change: dict[str, Any], *names: str, categories: Categories = NAMED) -> str:
        path = write_json(tmp_path / "a.json", content | change)
        with pytest.raises(UserError) as raised:
            ids_of_file(Path(path), files(*names), categories)
        return str(raised.value)

    named = [row | {"id": str(row["id"])} for row in content["images"]]
    assert "--fix OUT.json" in refusal({"images": named}, "1.png")
    assert "no image called x.png" in refusal({}, "x.png")
    assert "photos/a/1.png and photos/b/1.png" in refusal({}, "a/1.png", "b/1.png")
    assert "the model knows none" in refusal({}, "1.png", categories=replace(NAMED, names=("cow", "pig")))
