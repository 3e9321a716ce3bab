"""Detections matched with objects by COCO's rule, and the confusion matrix, against a slow account."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detr_fabric.evaluate.confusion import confusion, table
from detr_fabric.evaluate.match import match, outcomes
from tests.evaluate.scenes import Found, Scene, Thing, as_arrays, best_first, drawn, overlap, slow_match

SEEDS = settings(max_examples=150, deadline=None, derandomize=True)


@SEEDS
@given(st.integers(0, 2**32 - 1))
def test_matches_and_how_images_went_are_what_matching_one_by_one_gives(seed: int) -> None:
    classes, scenes = drawn(seed)
    matches = match(*as_arrays(scenes, classes))
    of_thing = np.cumsum([0, *(sum(not thing.crowd for thing in there) for there, _ in scenes)])
    expected = []
    for start, (there, found), outcome in zip(of_thing, scenes, outcomes(matches, 0.375), strict=False):
        kept = [number for number, thing in enumerate(there) if not thing.crowd]
        partner = slow_match((there, found))
        expected += [-1 if partner[k] is None else start + kept.index(partner[k]) for k in sorted(partner)]
        above = {k: other for k, other in partner.items() if found[k].score >= 0.375}
        right = {other for other in above.values() if other is not None}
        assert outcome.right == len(right) and outcome.false == len(above) - len(right)
        assert outcome.missed.tolist() == [start + n for n, k in enumerate(kept) if k not in right]
        assert outcome.objects == len(kept) and outcome.mistakes == outcome.false + len(kept) - len(right)
        total = len(above) + len(kept)
        assert outcome.f1 == pytest.approx(2 * len(right) / total if total else 1.0)
    assert matches.object.tolist() == expected


def slow_table(scene: Scene, threshold: float) -> Counter:
    """The confusion matrix of one image."""
    there, found = scene
    counted, table = slow_match(scene), Counter()
    free = sorted((k for k, thing in enumerate(there) if not thing.crowd), key=lambda k: there[k].label)
    by_label = sorted(range(len(found)), key=lambda k: (-found[k].score, found[k].label))
    for number in by_label:
        box, label, score = found[number]
        if score < threshold or number not in counted:
            continue
        best, best_iou = None, 0.5
        for other in free:
            if overlap(box, there[other].box) >= best_iou:
                best, best_iou = other, overlap(box, there[other].box)
        if best is not None:
            free.remove(best)
        table["background" if best is None else there[best].label, label] += 1
    for number in free:
        table[there[number].label, "background"] += 1
    return table


@SEEDS
@given(st.integers(0, 2**32 - 1))
def test_the_confusion_matrix_is_what_matching_one_by_one_gives(seed: int) -> None:
    classes, scenes = drawn(seed)
    counts = confusion(match(*as_arrays(scenes, classes)), classes, 0.375)
    expected = sum((slow_table(scene, 0.375) for scene in scenes), Counter())
    names = [*range(classes), "background"]
    assert {
        (t, f): int(counts[r, c]) for r, t in enumerate(names) for c, f in enumerate(names) if counts[r, c]
    } == dict(expected)


def test_images_without_objects_or_detections_have_no_mistakes() -> None:
    matches = match(*as_arrays([([], []), ([], [])], 2))
    assert [(each.f1, each.mistakes) for each in outcomes(matches, 0.5)] == [(1, 0), (1, 0)]
    assert not confusion(matches, 2, 0.5).any()


def test_detections_of_classes_without_annotations_do_not_count() -> None:
    box = (0.0, 0.0, 4.0, 4.0)
    scenes: list[Scene] = [([Thing(box, 0)], [Found(box, 0, 0.5), Found(box, 1, 0.9)])]
    assert match(*as_arrays(scenes, 2), frozenset({0})).labels.tolist() == [0]
    assert match(*as_arrays(scenes, 2)).labels.tolist() == [0, 1]


def test_every_query_may_give_several_detections() -> None:
    """Of one box under two classes both count, and more than 100 detections of several classes."""
    box = (0.0, 0.0, 4.0, 4.0)
    found = [Found(box, k % 3, 1 - k / 400) for k in range(300)]
    matches = match(*as_arrays([([Thing(box, 0), Thing(box, 2)], found)], 3))
    assert len(matches.object) == 300 and best_first(found) == list(range(300))
    assert matches.right.nonzero()[0].tolist() == [0, 2]
    assert confusion(matches, 3, 0.0).sum() == 300


def test_the_table_is_printed_whole_or_as_the_most_frequent_mistakes() -> None:
    counts = np.array([[8, 1, 0, 2], [0, 5, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    lines = table(counts, ["cat", "dog", "unused"])
    assert [line.split() for line in lines] == [
        ["cat", "dog", "missed"],
        ["cat", "8", "1", "2"],
        ["dog", "0", "5", "0"],
        ["nothing", "there", "4", "0"],
    ]
    many = np.eye(31, dtype=np.int64) * 9
    many[30, 30] = 0
    many[3, 4], many[5, 30], many[30, 6] = 7, 3, 5
    assert table(many, [f"class{k}" for k in range(30)]) == [
        "270 of 280 objects found under their name; most frequent mistakes:",
        "class3 taken for class4, 7 of 16",
        "class5 missed, 3 of 12",
        "class6 where there is none, 5 of 14 found",
    ]
