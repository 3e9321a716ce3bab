"""Which images share a batch, and what fits into memory: similar shapes together, large batches split."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric

from detr_fabric.benchmark.data import SIZES
from detr_fabric.config import COCO_SCALES, DataConfig
from detr_fabric.data.batch import pad_images
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.padding import padding_of, pixels, split_batch
from detr_fabric.data.padding_estimate import estimate_padding, padding_summary
from detr_fabric.data.sampler import Shard, step_batches
from detr_fabric.data.transforms import EvalTransform, TrainTransform, resize
from detr_fabric.evaluate.detect import evaluate
from tests.batches import eval_loader, sized, train_loader
from tests.coco_files import coco, image, thing, write_images, write_json
from tests.model.test_detr import small_detr

Steps = list[list[list[int]]]
Sizes = dict[int, tuple[int, int]]


def coco_sizes(count: int) -> list[tuple[int, int]]:
    return [SIZES[number % len(SIZES)] for number in range(count)]


# ---- images of similar shape


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 10**6), st.booleans())
def test_the_shape_of_a_sample_is_known_before_its_image_is_read(h: int, w: int, seed: int, crop: bool) -> None:
    transform = TrainTransform((16, 24, 40), 64, 0.5, crop)
    if crop and max(h, w) / min(h, w) > 20:
        return  # such an image is first resized to thousands of pixels: slow, and nothing else
    picture = torch.zeros(3, h, w, dtype=torch.uint8)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    for each in (transform, EvalTransform(40, 64)):
        plan = each.plan(h, w, random.Random(seed))
        found, _, _ = plan.apply(picture, *nothing)
        assert each.plan(h, w, random.Random(seed)) == plan and plan.size == tuple(resize(found, plan.size).shape[-2:])


splits = st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4))  # batch size, accumulated, ranks


def global_steps(sizes: Sizes | None, images: int, split: tuple[int, int, int], skip: int) -> Steps:
    """[step][rank and micro-batch][image] of all ranks."""
    batch, accumulate, world = split
    ranks = [step_batches(images, 3, 5, batch, accumulate, Shard(rank, world), skip, sizes) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    assert all(epoch == 5 for steps in ranks for step in steps for micro in step for epoch, _ in micro)
    return [
        [[index for _, index in micro] for steps in ranks for micro in steps[step]] for step in range(len(ranks[0]))
    ]


def contents(steps: Steps) -> list[list[int]]:
    """The images of each step."""
    return [sorted(index for micro in step for index in micro) for step in steps]


@settings(max_examples=80, deadline=None)
@given(st.data(), splits, st.integers(0, 300), st.integers(0, 6))
def test_grouping_moves_images_between_steps_and_does_nothing_else(
    data: st.DataObject, split: tuple[int, int, int], more: int, skip: int
) -> None:
    batch, accumulate, world = split
    size = batch * accumulate * world
    images = size + more
    side = st.integers(1, 40)
    some = data.draw(st.lists(st.one_of(st.tuples(side, side), st.just((0, 0))), min_size=1, max_size=20))
    shapes = {index: some[index % len(some)] for index in range(images)}
    steps = global_steps(shapes, images, split, 0)
    plain = global_steps(None, images, split, 0)
    seen, expected = (sorted(i for step in each for micro in step for i in micro) for each in (steps, plain))
    assert seen == expected and len(steps) == images // size
    assert all(len(step) == accumulate * world and {len(micro) for micro in step} == {batch} for step in steps)
    assert global_steps(shapes, images, split, skip) == steps[skip:]
    for other in ((size, 1, 1), (1, size, 1), (1, 1, size)):
        assert contents(global_steps(shapes, images, other, 0)) == contents(steps)


def test_the_grouped_order_is_pinned_so_that_runs_can_be_resumed_by_later_versions() -> None:
    shapes = {index: (10 + index % 3, 20 + 15 * (index % 2)) for index in range(12)}
    assert global_steps(shapes, 12, (2, 1, 2), 0) == [[[4, 10], [7, 1]], [[3, 9], [11, 5]], [[0, 6], [2, 8]]]


@pytest.mark.parametrize("split", [(2, 1, 1), (4, 4, 1), (4, 1, 8), (8, 1, 1)])
def test_grouping_leaves_less_than_a_third_of_the_padding(split: tuple[int, int, int]) -> None:
    data = sized(coco_sizes(4096))
    shapes = {index: data.size((5, index)) for index in range(len(data))}
    shares = []
    for known in (None, shapes):
        steps = global_steps(known, len(data), split, 0)
        shares.append(padding_of([[shapes[i] for i in micro] for step in steps for micro in step]).share)
    assert shares[1] < shares[0] / 3


def test_no_rank_gets_the_small_images_again_and_again() -> None:
    data = sized(coco_sizes(2048))
    shapes = {index: data.size((5, index)) for index in range(len(data))}
    steps = global_steps(shapes, len(data), (4, 1, 4), 0)
    area = np.array([[pixels([shapes[i] for i in micro]) for micro in step] for step in steps])
    assert np.ptp(area.mean(0)) < 0.1 * area.mean()


@pytest.mark.parametrize("batch", [2, 4])
def test_the_estimate_agrees_with_the_batches_that_are_loaded(tmp_path: Path, batch: int) -> None:
    rng = np.random.default_rng(0)
    sides = rng.integers(20, 60, (96, 2)).tolist()
    content = coco([image(n, height=h, width=w) for n, (h, w) in enumerate(sides)], [thing(1, 1)])
    annotations = read_annotations(write_json(tmp_path / "instances.json", content))
    transform = TrainTransform((20, 24, 28, 32), 64, 0.5, crop=False)
    data = CocoDetection(write_images(tmp_path / "images", content), annotations, transform, seed=7)
    for grouped in (False, True):
        each = train_loader(data, batch, 1, group_by_shape=grouped)
        loaded = [part for step in each.epoch(0) for part in step]
        padded = sum(int(batch.mask.sum()) for batch, _ in loaded) / sum(batch.mask.numel() for batch, _ in loaded)
        estimate = estimate_padding(each, grouped)
        assert estimate is not None and estimate.share == pytest.approx(padded, abs=0.03)


def test_the_estimate_takes_a_moment_at_cocos_size_and_names_the_flag() -> None:
    data = sized(coco_sizes(118_287))
    started = time.perf_counter()
    each = train_loader(data, 4, 4)
    now, grouped = estimate_padding(each, False), estimate_padding(each, True)
    assert time.perf_counter() - started < 10  # 0.3 s
    assert now is not None and grouped is not None and 0.28 < now.share < 0.36 and grouped.share < 0.1
    assert f"{grouped.share:.0%} with --data.group-by-shape" in padding_summary(each)
    other = train_loader(data, 4, 4, group_by_shape=True)
    assert f"{now.share:.0%} without --data.group-by-shape" in padding_summary(other)
    assert "--data.max-batch-pixels" in padding_summary(train_loader(data, 4, 4, max_batch_pixels=10**7))
    unknown = train_loader(sized([(0, 0)] * 8), 4, 1)
    assert estimate_padding(unknown, False) is None and "unknown" in padding_summary(unknown)


def test_real_sizes_leave_a_third_of_the_padding(coco_mini: Path) -> None:
    annotations = read_annotations(coco_mini / "annotations" / "instances_train2017.json")
    data = sized(annotations.sizes.tolist() * 20)
    plain, grouped = (estimate_padding(train_loader(data, 4, 4), how) for how in (False, True))
    assert plain is not None and grouped is not None and grouped.share < plain.share / 3


# ---- evaluation


def test_evaluation_in_batches_of_one_shape_finds_what_it_finds_image_by_image(tmp_path: Path) -> None:
    """Two shapes in turn, six images of each: batches of three need no padding, on one rank and on two."""
    images = [image(n, width=(48, 64)[n % 2], height=(64, 40)[n % 2]) for n in range(12)]
    content = coco(images, [thing(n, n, box=(5, 5, 20 + n, 30)) for n in range(12)])
    annotations = read_annotations(write_json(tmp_path / "instances.json", content))
    folder = write_images(tmp_path / "images", content)
    data = CocoDetection(folder, annotations, EvalTransform(40, 64), seed=0)
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup_module(small_detr())
    alone = evaluate(fabric, model, eval_loader(data), "pycocotools")
    batches = eval_loader(data, 3)
    together = evaluate(fabric, model, batches, "pycocotools")
    assert alone is not None and together is not None
    assert not any(bool(batch.mask.any()) for batch, _ in batches)
    assert [found.image_id for found in together.detections] == data.image_ids
    assert together.stats == pytest.approx(alone.stats, abs=1e-6)
    for one, other in zip(alone.detections, together.detections, strict=True):
        torch.testing.assert_close(other.boxes, one.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(other.scores, one.scores, rtol=1e-4, atol=1e-5)
    ranks = [eval_loader(data, 3, rank, 2) for rank in (0, 1)]
    assert not any(bool(batch.mask.any()) for rank in ranks for batch, _ in rank)
    assert sorted(target.image_id for rank in ranks for _, targets in rank for target in targets) == data.image_ids


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 6))
def test_evaluation_by_shape_keeps_ranks_even(images: int, batch: int, world: int) -> None:
    data = sized([(20 + 7 * n % 30, 20 + 11 * n % 30) for n in range(images)], EvalTransform(32, 64))
    orders = [eval_loader(data, batch, rank, world).order for rank in range(world)]
    assert len({tuple(map(len, order)) for order in orders}) == 1
    assert {index for order in orders for samples in order for _, index in samples} == set(range(images))


@pytest.mark.parametrize(("batch", "world"), [(4, 1), (8, 1), (4, 2)])
def test_evaluation_by_shape_leaves_a_third_of_the_padding(coco_mini: Path, batch: int, world: int) -> None:
    annotations = read_annotations(coco_mini / "annotations" / "instances_val2017.json")
    data = sized(annotations.sizes.tolist(), EvalTransform(800, 1333))
    shapes = [data.size((0, index)) for index in range(len(data))]
    plain = padding_of([shapes[start : start + batch] for start in range(0, len(shapes), batch)])
    orders = [eval_loader(data, batch, rank, world).order for rank in range(world)]
    by_shape = padding_of([[shapes[index] for _, index in samples] for order in orders for samples in order])
    assert by_shape.share < plain.share / 3


# ---- batches of limited size


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=9),
    st.integers(1, 9000),
    st.sampled_from([1, 8]),
)
def test_parts_of_a_batch_hold_every_image_once_and_at_most_so_many_pixels(
    shapes: list[tuple[int, int]], limit: int, multiple: int
) -> None:
    parts = split_batch(shapes, limit, multiple)
    assert sorted(position for part in parts for position in part) == list(range(len(shapes)))
    assert all(len(part) == 1 or pixels([shapes[p] for p in part], multiple) <= limit for part in parts)
    whole = list(range(len(shapes)))
    assert (parts == [whole]) == (len(shapes) == 1 or pixels(shapes, multiple) <= limit)
    assert split_batch(shapes, None, multiple) == [whole]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_loaded_batch_exceeds_the_limit_and_steps_hold_the_same_images(tmp_path: Path, workers: int) -> None:
    sides = np.random.default_rng(1).integers(20, 60, (40, 2)).tolist()
    content = coco([image(n, height=h, width=w) for n, (h, w) in enumerate(sides)], [thing(1, 1)])
    annotations = read_annotations(write_json(tmp_path / "instances.json", content))
    transform = TrainTransform((20, 32), 64, 0.5, crop=True)
    data = CocoDetection(write_images(tmp_path / "images", content), annotations, transform, seed=7)
    limit = 64 * 32
    plain = list(train_loader(data, 4, 2).epoch(1))
    limited = list(train_loader(data, 4, 2, workers=workers, max_batch_pixels=limit).epoch(1))
    assert max(len(step) for step in limited) > 2
    for whole, parts in zip(plain, limited, strict=True):
        assert all(batch.mask.numel() <= limit for batch, _ in parts)
        images = [
            {
                target.image_id: picture[:, : target.size[0], : target.size[1]]
                for batch, targets in step
                for picture, target in zip(batch.images, targets, strict=True)
            }
            for step in (whole, parts)
        ]
        assert images[0].keys() == images[1].keys()
        assert all(torch.equal(picture, images[1][name]) for name, picture in images[0].items())
        for batch, targets in parts:
            alone = pad_images([images[1][target.image_id] for target in targets])
            assert torch.equal(alone.images, batch.images) and torch.equal(alone.mask, batch.mask)


def test_a_limit_below_a_single_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.max_batch_pixels is 1000000, .* 1066400 .*: raise it"):
        DataConfig(root="x", scales=COCO_SCALES, max_size=1333, max_batch_pixels=10**6)
    with pytest.raises(ValueError, match="1075200"):  # 800 x 1344
        DataConfig(root="x", scales=(800,), max_size=1333, max_batch_pixels=1_070_000, pad_multiple=32)
    with pytest.raises(ValueError, match="max_batch_pixels is 0"):
        DataConfig(max_batch_pixels=0)
