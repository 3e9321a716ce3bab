"""An original checkpoint is evaluated by its file alone, as the original's --eval --resume does."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_fabric.data.formats.coco_classes import COCO_CLASSES
from detr_fabric.evaluate import __main__ as evaluate
from tests.coco_files import coco, image, thing, write_json, write_root
from tests.predict.small import results, run
from tests.runtime.test_rebuild import build

COUNT = 3


@pytest.mark.process
def test_an_original_checkpoint_scores_what_pycocotools_makes_of_its_detections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = build(91, heads=8)
    file = tmp_path / "detr-r18-1234abcd.pth"
    torch.save({"model": model.state_dict()}, file)
    categories = [{"id": number, "name": name} for number, name in COCO_CLASSES.items()]
    images = [image(number) for number in range(1, COUNT + 1)]
    root, annotations = tmp_path / "coco", tmp_path / "coco" / "annotations" / "instances_val2017.json"
    empty = coco(images, [], categories)
    write_root(root, empty, empty)
    predict = (file, root / "val2017", "--annotations", annotations, "--threshold", "0", "--no-pictures")
    assert run(monkeypatch, *predict, "--out", tmp_path / "out", "--accelerator", "cpu") == 0
    found = sorted(results(tmp_path / "out"), key=lambda row: -row["score"])
    best = [next(row for row in found if row["image_id"] == entry["id"]) for entry in images]
    objects = [
        thing(n, row["image_id"], row["bbox"], row["category_id"]) | {"area": row["area"], "iscrowd": 0}
        for n, row in enumerate(best, 1)
    ]
    write_json(annotations, coco(images, objects, categories))

    arguments = (file, "--data.root", root, "--accelerator", "cpu", "--out", tmp_path / "scores.json")
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, arguments)])
    evaluate.main()
    scores = json.loads((tmp_path / "scores.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        scored = COCOeval(truth, truth.loadRes(str(tmp_path / "out" / "predictions.json")), "bbox")
        for step in (scored.evaluate, scored.accumulate, scored.summarize):
            step()
    assert scores["AP"] > 0.1
    assert (scores["AP"], scores["AP50"]) == pytest.approx(tuple(scored.stats[:2]), abs=1e-6)
