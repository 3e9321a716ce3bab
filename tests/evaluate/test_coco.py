"""The 12 COCO statistics: golden numbers, both libraries equal, and what must never become a score."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detr_fabric.errors import UserError
from detr_fabric.evaluate import coco
from detr_fabric.evaluate.coco import STATS, Backend, Detections, score
from tests.patching import Patch

BACKENDS: tuple[Backend, ...] = ("pycocotools", "hotcoco")
GOLDEN = Path(__file__).parents[1] / "golden" / "coco_mini_val_predictions.npz"


def ground_truth(boxes: list[tuple[int, int, list[float]]], images: int, classes: int) -> dict[str, Any]:
    """COCO ground truth from (image number, label, xywh), none of them crowds."""
    return {
        "images": [{"id": number + 1, "height": 100, "width": 100} for number in range(images)],
        "categories": [{"id": label + 1, "name": str(label)} for label in range(classes)],
        "annotations": [
            {"id": k, "image_id": image, "category_id": label + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for k, (image, label, box) in enumerate(boxes, start=1)
        ],
    }


def found(image_id: int | str, scores: list[float], labels: list[int], boxes: list[list[float]]) -> Detections:
    return Detections(image_id, torch.tensor(scores), torch.tensor(labels), torch.tensor(boxes).float().reshape(-1, 4))


def random_case(seed: int) -> tuple[dict[str, Any], list[int], list[Detections]]:
    """Crowds, objects without area, tied scores, more than 100 detections, empty images, labels without a category."""
    rng = np.random.default_rng(seed)
    images, classes = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    objects, detections = [], []
    ids = rng.permutation(1000)[:images].tolist()
    for number, image_id in enumerate(ids, start=1):
        size = float(rng.choice([20.0, 80.0, 300.0]))  # small, medium, large
        corner, side = rng.uniform(0, 300, (5, 2)), rng.uniform(0.3, 1, (5, 2)) * size
        there = [(number, int(rng.integers(classes)), [*corner[k], *side[k]]) for k in range(int(rng.integers(0, 6)))]
        objects += there
        count = int(rng.choice([0, 3, 40, 130]))
        near = np.array([box for _, _, box in there] or [[0.0, 0.0, 50.0, 50.0]])[
            rng.integers(0, len(there) or 1, count)
        ]
        near = near + rng.normal(0, 0.05 * size, near.shape)
        labels = rng.integers(0, classes + 1, count)
        detections.append(
            Detections(
                image_id,
                torch.tensor(rng.integers(0, 12, count) / 12, dtype=torch.float32),
                torch.tensor(labels),
                torch.tensor(np.concatenate([near[:, :2], near[:, :2] + np.maximum(near[:, 2:], 0)], 1)).float(),
            )
        )
    truth = ground_truth(objects, images, classes)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = int(rng.random() < 0.2)
        annotation["area"] *= float(rng.choice([0, 0.5, 1]))
    return truth, ids, [d for d in detections if rng.random() < 0.9]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_both_libraries_give_the_same_numbers(seed: int) -> None:
    case = random_case(seed)
    reference, fast = (score(*case, backend) for backend in BACKENDS)
    assert list(reference.stats) == list(fast.stats) == list(STATS)
    np.testing.assert_allclose(list(fast.stats.values()), list(reference.stats.values()), rtol=0, atol=1e-12)
    assert fast.per_class.keys() == reference.per_class.keys()
    if reference.per_class:
        assert np.mean([*reference.per_class.values()]) == pytest.approx(reference.stats["AP"], rel=0, abs=1e-12)
    for label, ap in reference.per_class.items():
        assert fast.per_class[label] == pytest.approx(ap, rel=0, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_detections_score_the_golden_statistics(backend: Backend, coco_mini: Path) -> None:
    golden = np.load(GOLDEN)
    truth = json.loads((coco_mini / "annotations" / "instances_val2017.json").read_text())
    ids = golden["image_ids"].tolist()
    number = {image_id: k for k, image_id in enumerate(ids, start=1)}
    label = {category: k for k, category in enumerate(sorted(c["id"] for c in truth["categories"]))}
    truth["images"] = [{"id": k} for k in number.values()]
    for category in truth["categories"]:
        category["id"] = label[category["id"]] + 1
    for k, annotation in enumerate(truth["annotations"], start=1):
        annotation["id"], annotation["image_id"] = k, number[annotation["image_id"]]
        annotation["category_id"] = label[annotation["category_id"]] + 1
    detections = [
        Detections(
            image_id,
            torch.from_numpy(golden["scores"][k]),
            torch.tensor([label[c] for c in golden["category_ids"][k].tolist()]),
            torch.from_numpy(golden["boxes_xyxy"][k]),
        )
        for k, image_id in enumerate(ids)
    ]
    scores = score(truth, ids, detections, backend)
    np.testing.assert_allclose(list(scores.stats.values()), golden["stats"], rtol=0, atol=1e-12)
    assert np.mean(list(scores.per_class.values())) == pytest.approx(scores.stats["AP"], abs=1e-12)


TWO_OBJECTS = ground_truth([(1, 0, [10, 10, 20, 20]), (2, 2, [5, 5, 50, 50])], images=2, classes=3)
PERFECT = [found("a", [0.9], [0], [[10, 10, 30, 30]]), found("b", [0.8], [2], [[5, 5, 55, 55]])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_perfect_detections_score_one_and_sizes_without_objects_minus_one(backend: Backend) -> None:
    scores = score(TWO_OBJECTS, ["a", "b"], PERFECT, backend)
    expected = {name: -1.0 if name in ("APl", "ARl") else 1.0 for name in STATS}
    assert scores.stats == pytest.approx(expected, abs=1e-12)
    assert scores.per_class == pytest.approx({0: 1.0, 2: 1.0})  # class 1 has no object: absent


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "nothing", [[], [found("a", [], [], []), found("b", [], [], [])]], ids=["no images", "no boxes"]
)
def test_no_detections_score_zero(backend: Backend, nothing: list[Detections]) -> None:
    scores = score(TWO_OBJECTS, ["a", "b"], nothing, backend)
    assert scores.stats == {name: -1.0 if name in ("APl", "ARl") else 0.0 for name in STATS}
    assert scores.per_class == {0: 0.0, 2: 0.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_ground_truth_without_objects_scores_minus_one(backend: Backend) -> None:
    scores = score(ground_truth([], images=2, classes=3), ["a", "b"], PERFECT, backend)
    assert set(scores.stats.values()) == {-1.0}
    assert scores.per_class == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_that_sharding_repeats_counts_once_and_the_first_wins(backend: Backend) -> None:
    worse = PERFECT[0]._replace(boxes=torch.tensor([[60.0, 60, 70, 70]]), scores=torch.tensor([0.95]))
    assert score(TWO_OBJECTS, ["a", "b"], [*PERFECT, worse], backend).stats["AP"] == pytest.approx(1.0)
    assert score(TWO_OBJECTS, ["a", "b"], [worse, *PERFECT], backend).stats["AP"] == pytest.approx(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_library_that_is_asked_for_scores(backend: Backend, patch: Patch) -> None:
    patch(coco, f"_{backend}", getattr(coco, f"_{backend}"))  # which fails if nothing calls it
    assert score(TWO_OBJECTS, ["a", "b"], PERFECT, backend).stats["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ground_truth_is_left_as_it_is(backend: Backend) -> None:
    before = copy.deepcopy(TWO_OBJECTS)
    score(TWO_OBJECTS, ["a", "b"], PERFECT, backend)
    assert before == TWO_OBJECTS


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_without_a_category_are_dropped(backend: Backend) -> None:
    extra = PERFECT[0]._replace(
        scores=torch.tensor([0.99, 0.9]), labels=torch.tensor([90, 0]), boxes=PERFECT[0].boxes.repeat(2, 1)
    )
    scores = score(TWO_OBJECTS, ["a", "b"], [extra, PERFECT[1]], backend)
    assert scores == score(TWO_OBJECTS, ["a", "b"], PERFECT, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", ["scores", "boxes"])
def test_values_that_are_not_finite_are_refused_by_image(field: str, value: float, backend: Backend) -> None:
    tensor = getattr(PERFECT[1], field).clone()
    tensor.view(-1)[0] = value
    with pytest.raises(UserError, match="image b are not finite"):
        score(TWO_OBJECTS, ["a", "b"], [PERFECT[0], PERFECT[1]._replace(**{field: tensor})], backend)


def test_detections_of_an_unknown_image_are_refused() -> None:
    with pytest.raises(UserError, match="image b"):
        score(TWO_OBJECTS, ["a", 2], PERFECT, "hotcoco")


@pytest.mark.parametrize("backend", BACKENDS)
def test_scoring_prints_nothing_and_leaves_the_ground_truth_alone(
    backend: Backend, capfd: pytest.CaptureFixture[str]
) -> None:
    truth = copy.deepcopy(TWO_OBJECTS)
    score(truth, ["a", "b"], PERFECT, backend)
    assert capfd.readouterr() == ("", "")
    assert truth == TWO_OBJECTS
