"""Best F1, duplicates, calibration and TIDE's errors against slow accounts that follow the definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detr_fabric.data.ground_truth import ground_truth
from detr_fabric.evaluate.coco import score
from detr_fabric.evaluate.diagnosis import diagnose
from detr_fabric.evaluate.match import match
from tests.evaluate.scenes import Box, Found, Scene, Thing, as_arrays, drawn, overlap, random_scenes, slow_match

SEEDS = settings(max_examples=80, deadline=None, derandomize=True)
Point = tuple[float, bool]  # score, right


def diagnosed(scenes: list[Scene], classes: int, threshold: float = 0.5) -> dict[str, Any]:
    annotations, detections = as_arrays(scenes, classes)
    return diagnose(match(annotations, detections), annotations.categories, threshold)


def points(scenes: list[Scene], label: int | None = None) -> list[Point]:
    """The detections that count, of one class or all, in the order of the data set."""
    return [
        (found[k].score, partner is not None)
        for there, found in scenes
        for k, partner in sorted(slow_match((there, found)).items())
        if label is None or found[k].label == label
    ]


def count(scenes: list[Scene], label: int | None = None) -> int:
    return sum(not t.crowd and label in (None, t.label) for there, _ in scenes for t in there)


def slow_best(found: list[Point], objects: int) -> dict[str, Any]:
    best = {"f1": 0.0, "threshold": None, "precision": None, "recall": 0.0, "objects": objects}
    for threshold in sorted({value for value, _ in found}, reverse=True):
        kept = [right for value, right in found if value >= threshold]
        hits = sum(kept)
        precision, recall = hits / len(kept), hits / objects if objects else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        if f1 > best["f1"] + 1e-12:
            best |= {"f1": f1, "threshold": threshold, "precision": precision, "recall": recall}
    return best


@SEEDS
@given(st.integers(0, 2**32 - 1))
def test_the_best_threshold_is_that_of_trying_every_score(seed: int) -> None:
    classes, scenes = drawn(seed)
    made = diagnosed(scenes, classes)
    assert made["F1"] == pytest.approx(slow_best(points(scenes), count(scenes)))
    with_objects = [label for label in range(classes) if count(scenes, label)]
    assert list(made["F1_class"]) == [f"class{label}" for label in with_objects]
    for label in with_objects:
        expected = slow_best(points(scenes, label), count(scenes, label))
        assert made["F1_class"][f"class{label}"] == pytest.approx(expected)


@SEEDS
@given(st.integers(0, 2**32 - 1))
def test_calibration_is_the_share_of_right_detections_in_each_bin_of_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scenes = [
        (there, [each._replace(score=float(np.float32(rng.random()))) for each in found])
        for there, found in random_scenes(rng, 2, images=5)
    ]
    found, made = points(scenes), diagnosed(scenes, 2)["calibration"]
    error = 0.0
    for number, each in enumerate(made["bins"]):
        low, high = number / 10, (number + 1) / 10
        inside = [(value, right) for value, right in found if low <= value < high]
        assert (each["from"], each["to"]) == pytest.approx((low, high)) and each["detections"] == len(inside)
        if not inside:
            assert each["score"] is None and each["precision"] is None
            continue
        mean, precision = (math.fsum(column) / len(inside) for column in zip(*inside, strict=True))
        assert (each["score"], each["precision"]) == pytest.approx((mean, precision))
        error += len(inside) / len(found) * abs(mean - precision)
    assert len(made["bins"]) == 10 and made["error"] == pytest.approx(error)


@SEEDS
@given(st.integers(0, 2**32 - 1))
def test_duplicates_are_pairs_of_one_class_in_one_image(seed: int) -> None:
    scenes = random_scenes(np.random.default_rng(seed), 2)
    pairs = detections = 0
    for there, found in scenes:
        kept = [found[k] for k in slow_match((there, found)) if found[k].score >= 0.25]
        detections += len(kept)
        pairs += sum(
            a.label == b.label and overlap(a.box, b.box) >= 0.8 for n, a in enumerate(kept) for b in kept[n + 1 :]
        )
    rate = pairs / detections if detections else 0
    expected = {"pairs": pairs, "detections": detections, "rate": rate, "threshold": 0.25, "iou": 0.8}
    assert diagnosed(scenes, 2, 0.25)["duplicates"] == pytest.approx(expected)


# TIDE


def slow_ap(found: list[Point], objects: int) -> float:
    """COCO's AP: the mean over 101 recalls of the highest precision at this recall or a higher one."""
    ranked = sorted(found, key=lambda point: -point[0])
    curve, hits = [], 0
    for rank, (_, right) in enumerate(ranked, start=1):
        hits += right
        curve.append((hits / objects if objects else 0.0, hits / rank))
    return sum(max((p for r, p in curve if r >= recall), default=0.0) for recall in np.linspace(0, 1, 101)) / 101


Row = dict[str, Any]


def rows(scenes: list[Scene]) -> list[Row]:
    """Every detection that counts, with the kind of its error, None if it is right, and the object it aims at."""
    made = []
    for image, (there, found) in enumerate(scenes):
        partner = slow_match((there, found))
        taken = {k for k in partner.values() if k is not None}
        for number in sorted(partner):
            box, label, value = found[number]
            row = {"score": value, "label": label, "right": partner[number] is not None, "kind": None, "aim": None}
            iou = {k: overlap(box, thing.box) for k, thing in enumerate(there) if not thing.crowd}
            own = {k: v for k, v in iou.items() if there[k].label == label}
            other = {k: v for k, v in iou.items() if there[k].label != label}
            best = max(own.values(), default=0.0), max(other.values(), default=0.0)
            if not row["right"]:
                if 0.1 <= best[0] <= 0.5:
                    row |= {"kind": "localisation", "aim": (image, max(own, key=own.__getitem__))}
                elif best[1] >= 0.5:
                    row |= {"kind": "classification", "aim": (image, max(other, key=other.__getitem__))}
                elif any(v >= 0.5 and k in taken for k, v in own.items()):
                    row["kind"] = "duplicate"
                else:
                    row["kind"] = "background" if max(best) <= 0.1 else "both"
            made.append(row)
    return made


def slow_tide(scenes: list[Scene], classes: int) -> dict[str, Any]:
    detections = rows(scenes)
    objects = {(i, k): t.label for i, (there, _) in enumerate(scenes) for k, t in enumerate(there) if not t.crowd}
    found = {(i, k) for i, scene in enumerate(scenes) for k in slow_match(scene).values()}
    aimed = {row["aim"] for row in detections}
    missed = objects.keys() - found - aimed
    present = [label for label in range(classes) if label in objects.values()]

    def ap(kept: list[Row], there: list[int]) -> float:
        each = (
            slow_ap([(r["score"], r["right"]) for r in kept if r["label"] == label], there.count(label))
            for label in present
        )
        return sum(each) / len(present) if present else 0.0

    saved: dict[Any, int] = {}  # the object → the detection that is made right
    for number in sorted(range(len(detections)), key=lambda k: -detections[k]["score"]):
        aim = detections[number]["aim"]
        if aim is not None and aim not in found:
            saved.setdefault(aim, number)
    base, gains = ap(detections, [*objects.values()]), {}
    for kind in ("localisation", "classification", "duplicate", "background", "both"):
        kept = []
        for number, row in enumerate(detections):
            if row["kind"] != kind:
                kept.append(row)
            elif saved.get(row["aim"]) == number:
                kept.append(row | {"right": True, "label": objects[row["aim"]]})
        gains[kind] = ap(kept, [*objects.values()])
    gains["missed"] = ap(detections, [label for key, label in objects.items() if key not in missed])
    numbers = {kind: sum(row["kind"] == kind for row in detections) for kind in gains} | {"missed": len(missed)}
    return {"AP50": base, "delta_AP50": {k: max(0.0, v - base) for k, v in gains.items()}, "counts": numbers}


@SEEDS
@given(st.integers(0, 2**32 - 1))
def test_errors_and_what_they_cost_are_those_of_the_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 4))
    scenes = [  # without ties of scores, which the order of detections decides
        (there, [each._replace(score=float(np.float32(rng.random()))) for each in found])
        for there, found in random_scenes(rng, classes, images=5, crowds=0.1)
    ]
    made, expected = diagnosed(scenes, classes)["tide"], slow_tide(scenes, classes)
    assert made["counts"] == expected["counts"]
    assert made["delta_AP50"] == pytest.approx(expected["delta_AP50"], abs=1e-9)
    annotations, detections = as_arrays(scenes, classes)
    if len(annotations.labels) > annotations.crowd.sum():
        stats = score(ground_truth(annotations), [*annotations.image_ids], detections, "hotcoco").stats
        assert made["AP50"] == pytest.approx(stats["AP50"], abs=1e-9)


def test_one_error_of_each_kind_is_named_as_in_the_paper() -> None:
    """Figure 2 of the paper: a box beside it, another class, both, a second box, and nothing there."""
    dog: Box = (0.0, 0.0, 10.0, 10.0)
    cases = {
        "localisation": Found((5.0, 0.0, 15.0, 10.0), 0, 0.5),
        "classification": Found(dog, 1, 0.5),
        "both": Found((5.0, 0.0, 15.0, 10.0), 1, 0.5),
        "background": Found((50.0, 50.0, 60.0, 60.0), 0, 0.5),
        "duplicate": Found(dog, 0, 0.5),
    }
    for kind, wrong in cases.items():
        found = [wrong, Found(dog, 0, 0.9)] if kind == "duplicate" else [wrong]
        made = diagnosed([([Thing(dog, 0)], found)], 2)["tide"]["counts"]
        missed = kind in ("both", "background")
        assert made == {k: int(k == kind or (k == "missed" and missed)) for k in (*cases, "missed")}


def test_nothing_at_all_has_figures_too() -> None:
    made = diagnosed([([], [])], 1)
    assert made["F1"] == {"f1": 0, "threshold": None, "precision": None, "recall": 0, "objects": 0}
    assert made["F1_class"] == {} and made["duplicates"]["rate"] == made["calibration"]["error"] == 0
    assert set(made["tide"]["delta_AP50"].values()) == {0} == set(made["tide"]["counts"].values())
