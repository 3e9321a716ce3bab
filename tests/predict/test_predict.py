"""Prediction is what evaluation sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lightning_fabric import Fabric

from detr_fabric import load
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import Annotations, read_annotations
from detr_fabric.data.transforms import EvalTransform
from detr_fabric.evaluate.detect import detect
from tests.batches import eval_loader
from tests.coco_files import coco, image, write_json
from tests.predict.small import results, run, write_checkpoint, write_image


def test_boxes_are_what_evaluation_sees(coco_mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = read_annotations(coco_mini / "annotations" / "instances_val2017.json").first(12, with_objects=False)
    compare_with_evaluation(coco_mini / "val2017", annotations, 0.02, tmp_path, monkeypatch)


def test_boxes_of_odd_sizes_and_ids_are_what_evaluation_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(31, 47), (64, 64), (200, 33), (90, 60), (33, 200), (128, 96)] * 2
    images = [image(k, width=w, height=h, file_name=f"{k:04}.png") for k, (w, h) in enumerate(sizes, 3)]
    for entry in images:
        write_image(tmp_path / "images" / entry["file_name"], entry["width"], entry["height"])
    content = coco(images, [], [{"id": 9, "name": "cat"}, {"id": 70, "name": "dog"}])
    annotations = read_annotations(write_json(tmp_path / "a.json", content))
    compare_with_evaluation(tmp_path / "images", annotations, 0.2, tmp_path, monkeypatch)  # strips have much padding


def compare_with_evaluation(
    folder: Path, annotations: Annotations, padding: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 images under a random model, by prediction and by evaluation; padding: how far it may move scores."""
    file = write_checkpoint(tmp_path / "last.ckpt", annotations.categories)
    dataset = CocoDetection(folder, annotations, EvalTransform(64, 100), 0)
    loader = eval_loader(dataset)
    detector = load(file, "cpu")
    expected = []
    for found in detect(Fabric(accelerator="cpu", devices=1), detector.model, loader):
        for query in found.scores.argsort(descending=True, stable=True).tolist():
            left, top, right, bottom = found.boxes[query]
            box = [x.item() for x in (left, top, right - left, bottom - top)]
            category = annotations.categories.id(int(found.labels[query]))
            expected.append((found.image_id, category, found.scores[query].item(), box))
    paths = [folder / name for name in annotations.file_names.tolist()]
    for batch_size in (1, 5):
        out = tmp_path / str(batch_size)
        args = (file, *paths, "--threshold", "0", "--out", out, "--no-pictures", "--accelerator", "cpu")
        assert run(monkeypatch, *args, "--batch-size", batch_size) == 0
        assert len(results(out)) == len(expected) == 12 * 7 and not (out / "pictures").exists()
    rows = results(tmp_path / "1")
    assert [(row["image_id"], row["category_id"]) for row in rows] == [row[:2] for row in expected]
    np.testing.assert_allclose([row["score"] for row in rows], [row[2] for row in expected], atol=1e-5)
    np.testing.assert_allclose([row["bbox"] for row in rows], [row[3] for row in expected], atol=1e-2)
    # In larger batches images have padding beside them, which moves scores, though not by much.
    rows = results(tmp_path / "5")
    for image_id in dataset.image_ids:
        ours = sorted(row["score"] for row in rows if row["image_id"] == image_id)
        theirs = sorted(score for image, _, score, _ in expected if image == image_id)
        np.testing.assert_allclose(ours, theirs, atol=padding)


def test_images_are_batched_by_shape_so_that_these_batches_change_nothing(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (width, height) in enumerate(((90, 60), (60, 90), (120, 80), (80, 120), (150, 100))):
        write_image(
            tmp_path / "in" / f"image{number}{'x' * number}.png", width, height
        )  # 96 x 64 or 64 x 96 when resized
    for size in (1, 3):
        args = (checkpoint, tmp_path / "in", "--threshold", "0", "--out", tmp_path / str(size), "--accelerator", "cpu")
        assert run(monkeypatch, *args, "--batch-size", size, "--no-pictures") == 0
    alone, together = results(tmp_path / "1"), results(tmp_path / "3")
    assert [row["image_id"] for row in alone] == [row["image_id"] for row in together]
    for key, error in (("score", 1e-5), ("bbox", 1e-2)):
        np.testing.assert_allclose([row[key] for row in together], [row[key] for row in alone], atol=error)
