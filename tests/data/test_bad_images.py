"""--data.bad-images: what takes the place of image files that can't be read, with real broken files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from detr_fabric.data import images as image_files
from detr_fabric.data.dataset import IN_A_ROW, CocoDetection
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.transforms import TrainTransform
from detr_fabric.errors import UserError
from tests.batches import assert_same, eval_loader, ids, train_loader
from tests.coco_files import DAMAGE, coco, image, thing, write_images, write_json

IMAGES = 24
BAD = dict(zip((3, 4, 5, 11, 16, 23), DAMAGE, strict=True))  # three in a row, and the last one: the first follows it


def content(count: int = IMAGES) -> dict[str, Any]:
    return coco([image(n) for n in range(count)], [thing(n, n, category=1 + n % 2) for n in range(0, count, 2)])


def damage(folder: Path, bad: dict[int, str]) -> None:
    for number, fault in bad.items():
        DAMAGE[fault](folder / f"{number}.png")


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    folder = tmp_path_factory.mktemp("coco")
    annotations = read_annotations(write_json(folder / "instances.json", content()))
    damage(write_images(folder / "images", content()), BAD)
    transform = TrainTransform((20, 24, 28, 32), 64, 0.5, crop=True)
    return CocoDetection(folder / "images", annotations, transform, seed=7, bad_images="next")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "RETRY_SECONDS", ())


def test_the_next_readable_image_takes_the_place_of_each_bad_one(skipping: CocoDetection) -> None:
    for index in range(IMAGES):
        target = skipping[(2, index)][1]
        taken = index
        while taken in BAD:
            taken = (taken + 1) % IMAGES
        assert target.image_id == taken and (target.read_error is None) == (index not in BAD)
        if target.read_error is not None:
            assert target.read_error.startswith(f"image {index}: {skipping.folder / str(index)}.png ")


def test_batches_are_the_same_for_any_workers_ranks_and_skipped_steps(skipping: CocoDetection) -> None:
    whole = list(train_loader(skipping, batch=4, accumulate=1).epoch(1))
    errors = [[t.read_error for _, targets in step for t in targets] for step in whole]
    assert sum(error is not None for step in errors for error in step) == len(BAD)
    assert {len(step) for step in errors} == {4}
    assert_same(whole, list(train_loader(skipping, workers=2, batch=4, accumulate=1).epoch(1)))
    assert_same(whole[3:], list(train_loader(skipping, batch=4, accumulate=1).epoch(1, skip=3)))
    for batch, accumulate, world in ((2, 1, 2), (1, 2, 2), (1, 1, 4)):
        ranks = [list(train_loader(skipping, batch, accumulate, rank, world).epoch(1)) for rank in range(world)]
        for step, expected in enumerate(whole):
            assert ids([rank[step] for rank in ranks]) == ids([expected])
            split = [t.read_error for rank in ranks for _, targets in rank[step] for t in targets]
            assert split == errors[step]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_evaluation_a_bad_image_is_a_blank_under_its_own_id(skipping: CocoDetection, workers: int) -> None:
    blank = CocoDetection(skipping.folder, skipping.annotations, skipping.transform, 7, bad_images="blank")
    targets = [target for _, part in eval_loader(blank, 5, workers=workers) for target in part]
    targets.sort(key=lambda target: target.image_id)
    assert [target.image_id for target in targets] == list(range(IMAGES))
    assert [number for number, target in enumerate(targets) if target.read_error is not None] == list(BAD)
    assert all(len(target.labels) == 0 for target in targets if target.read_error is not None)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_where_nothing_can_be_read_skipping_ends(tmp_path: Path, count: int) -> None:
    annotations = read_annotations(write_json(tmp_path / "instances.json", content(count)))
    data = CocoDetection(tmp_path / "gone", annotations, TrainTransform((20,), 64, 0, crop=False), 7, "next")
    with pytest.raises(UserError, match=f"image {count - 1}: .* does not exist.* check the folder {data.folder}"):
        data[(0, count - 1)]
    assert IN_A_ROW < 40
