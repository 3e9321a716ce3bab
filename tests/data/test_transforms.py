"""Augmentations: golden sizes and boxes of the original, pixels beside Pillow's, randomness from one generator."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from detr_fabric.boxes import xyxy_to_cxcywh
from detr_fabric.config import COCO_SCALES
from detr_fabric.data.batch import allocate_batch
from detr_fabric.data.transforms import (
    CROP_SCALES,
    EvalTransform,
    TrainTransform,
    Transform,
    crop_region,
    hflip,
    random_region,
    resize,
    resize_boxes,
    resized_size,
    size_of,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "box_transforms.json").read_text())


def blank(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    boxes = torch.tensor(case["target"]["boxes"]).reshape(-1, 4)
    return (
        torch.zeros(3, case["height"], case["width"], dtype=torch.uint8),
        boxes,
        torch.tensor(case["target"]["labels"]),
    )


def assert_is(expected: dict[str, Any], image: Tensor, boxes: Tensor, labels: Tensor | None = None) -> None:
    assert list(image.shape[-2:]) == expected["size"]
    torch.testing.assert_close(boxes, torch.tensor(expected["boxes"]).reshape(-1, 4), rtol=0, atol=0)
    if labels is not None:
        assert labels.tolist() == expected["labels"]


def picture(height: int, width: int) -> Tensor:
    """A smooth picture with some noise, so that resampling has something to get wrong."""
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7 + c) * np.cos(y / 11) for c in range(3)])
    return torch.from_numpy((127 + 90 * waves + rng.normal(0, 10, waves.shape)).clip(0, 255).astype(np.uint8))


def applied(
    transform: Transform, image: Tensor, boxes: Tensor, labels: Tensor, seed: int | str
) -> tuple[Tensor, Tensor, Tensor]:
    return transform.plan(*size_of(image), random.Random(seed)).apply(image, boxes, labels)


def test_sizes_after_resizing_are_the_originals() -> None:
    rows = json.loads((GOLDEN / "resize_sizes.json").read_text())["rows"]
    assert len(rows) > 20
    for width, height, size, max_size, new_width, new_height in rows:
        assert resized_size(height, width, size, max_size) == (new_height, new_width)


@pytest.mark.parametrize("case", CASES)
def test_flip_is_the_originals(case: dict[str, Any]) -> None:
    image, boxes, _ = blank(case)
    assert_is(case["hflip"], *hflip(image, boxes))


@pytest.mark.parametrize("case", CASES)
def test_crop_is_the_originals_and_drops_boxes_without_area(case: dict[str, Any]) -> None:
    top, left, height, width = case["region_top_left_height_width"]
    assert_is(case["crop"], *crop_region(*blank(case), (top, left, height, width)))


@pytest.mark.parametrize("case", CASES)
def test_resize_and_normalised_boxes_are_the_originals(case: dict[str, Any]) -> None:
    image, boxes, _ = blank(case)
    height, width = resized_size(case["height"], case["width"], 320, 500)
    boxes = resize_boxes(boxes, (case["height"], case["width"]), (height, width))
    assert_is(case["resize_320_500"], image := resize(image, (height, width)), boxes)
    normalised = xyxy_to_cxcywh(boxes) / boxes.new_tensor([width, height, width, height])
    assert_is(case["normalized_after_resize"], image, normalised)


def test_golden_crops_include_dropped_boxes() -> None:
    assert any(len(case["crop"]["labels"]) < len(case["target"]["labels"]) for case in CASES)


def test_flip_mirrors_pixels_and_boxes_alike() -> None:
    image = torch.zeros(3, 8, 10, dtype=torch.uint8)
    image[:, 2:5, 1:4] = 255
    flipped, boxes = hflip(image, torch.tensor([[1.0, 2, 4, 5]]))
    left, top, right, bottom = boxes[0].int().tolist()
    assert flipped[:, top:bottom, left:right].min() == 255
    assert (flipped > 0).sum() == (image > 0).sum()


def test_crop_is_a_view_with_the_pixels_under_the_box() -> None:
    image = picture(50, 60)
    cropped, boxes, _ = crop_region(image, torch.tensor([[20.0, 20, 30, 40]]), torch.tensor([0]), (10, 15, 35, 30))
    assert cropped.data_ptr() == image[:, 10:, 15:].data_ptr()
    assert boxes.tolist() == [[5, 10, 15, 30]]
    torch.testing.assert_close(cropped[:, 10:30, 5:15], image[:, 20:40, 20:30])


@pytest.mark.parametrize("size", [(97, 140), (300, 200), (64, 64)])
@pytest.mark.parametrize("target", [48, 65, 160])
@pytest.mark.parametrize("view", ["whole", "cropped"])
def test_resized_pixels_are_exact_to_one_level_and_pillows_to_two(
    size: tuple[int, int], target: int, view: str
) -> None:
    image = picture(*size)
    if view == "cropped":
        image = image[:, 3:-5, 7:-2]
    height, width = resized_size(image.shape[1], image.shape[2], target, 1333)
    ours = resize(image, (height, width))
    assert ours.shape == (3, height, width)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BILINEAR)
    difference = (ours.permute(1, 2, 0).int() - torch.from_numpy(np.array(pillow)).int()).abs()
    assert difference.max() <= 2 and difference.float().mean() < 0.3
    exact = interpolate(image[None].double(), (height, width), mode="bilinear", antialias=True)[0]
    assert (ours - exact).abs().max() <= 1 + 1e-9


@pytest.mark.parametrize("size", [(64, 80), (32, 40), (32, 160), (130, 160)])
def test_a_resize_into_a_batch_writes_the_same_pixels_and_leaves_the_padding(size: tuple[int, int]) -> None:
    image = picture(64, 80)
    batch, (_, place) = allocate_batch([(140, 50), size], multiple=8)
    assert resize(image, size, out=place) is place
    height, width = size
    assert torch.equal(batch.images[1, :, :height, :width], resize(image, size))
    assert not batch.images[1, :, height:].any() and not batch.images[1, :, :, width:].any()
    assert batch.mask[1, height:].all() and batch.mask[1, :, width:].all()
    assert not batch.mask[1, :height, :width].any()


def test_resizing_to_the_same_size_returns_the_image_itself() -> None:
    image, boxes = picture(64, 80), torch.tensor([[1.0, 2, 3, 4]])
    assert resize(image, (64, 80)) is image
    plan = EvalTransform(64, 128).plan(64, 80, random.Random(0))
    untouched, _, _ = plan.apply(image, boxes, torch.tensor([0]))
    assert untouched is image and plan.size == (64, 80)


def test_extreme_shapes_keep_at_least_one_pixel_a_side() -> None:
    assert resized_size(1, 60000, 800, 1333) == (1, 60000)
    assert resized_size(2, 60000, 800, 1333) == (1, 30000)
    image = torch.zeros(3, 1, 5000, dtype=torch.uint8)
    augment = TrainTransform((64,), 128, 0.5, crop=True)
    for seed in range(8):
        size = augment.plan(1, 5000, random.Random(seed)).size
        cut, _, _ = applied(augment, image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), seed)
        assert min(size) >= 1 and resize(cut, size).shape == (3, *size)


def test_random_regions_have_the_originals_sides_and_stay_inside() -> None:
    regions = [random_region(500, 900, random.Random(seed)) for seed in range(400)]
    heights, widths = {h for _, _, h, _ in regions}, {w for _, _, _, w in regions}
    assert (min(heights), max(heights)) == (384, 500)
    assert (min(widths), max(widths)) == (384, 600)
    assert all(top >= 0 and left >= 0 and top + h <= 500 and left + w <= 900 for top, left, h, w in regions)


def test_training_augmentation_has_the_originals_frequencies() -> None:
    image, boxes, labels = (
        torch.zeros(3, 50, 60, dtype=torch.uint8),
        torch.tensor([[0.0, 0, 30, 50]]),
        torch.tensor([7]),
    )
    flipped = cropped = 0
    scales = set()
    for seed in range(300):
        # A flip alone moves the box of the left half to the right half.
        _, moved, _ = applied(TrainTransform((50,), 100, 0.5, crop=False), image, boxes, labels, seed)
        flipped += moved[0, 0].item() == 30
        size = TrainTransform((32, 40, 48), 100, 0.0, crop=True).plan(50, 60, random.Random(seed)).size
        cropped += size not in {(32, 38), (40, 48), (48, 57)}
        scales.add(min(size))
    assert 120 < flipped < 180
    assert 100 < cropped < 180  # some crops have the proportions of the image
    assert scales == {32, 40, 48}


def test_a_plan_crops_the_region_that_its_size_follows_from() -> None:
    transform = TrainTransform((480,), 500, 0.0, crop=True)
    plans = [transform.plan(600, 900, random.Random(seed)) for seed in range(200)]
    assert 70 < sum(plan.crop is not None for plan in plans) < 130
    for plan in plans:
        height, width = 600, 900
        if plan.crop is not None:
            before, (_, _, height, width) = plan.crop
            assert min(before) in CROP_SCALES
        assert plan.size == resized_size(height, width, 480, 500) and max(plan.size) <= 500


def test_augmentation_is_a_function_of_its_generator_alone() -> None:
    image, boxes = picture(120, 160), torch.tensor([[10.0, 10, 90, 80]])
    augment = TrainTransform((64, 80, 96), 128, 0.5, crop=True)
    random.seed(1)
    torch.manual_seed(1)
    first = applied(augment, image, boxes, torch.tensor([3]), "a")
    state, torch_state = random.getstate(), torch.get_rng_state()
    second = applied(augment, image, boxes, torch.tensor([3]), "a")
    assert augment.plan(120, 160, random.Random("a")) == augment.plan(120, 160, random.Random("a"))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_transforms_can_be_sent_to_spawned_workers() -> None:
    image, boxes, labels = picture(60, 80), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    for transform in (TrainTransform(COCO_SCALES, 1333, 0.5, True), EvalTransform(800, 1333)):
        copy = pickle.loads(pickle.dumps(transform))
        assert transform.plan(60, 80, random.Random(5)) == copy.plan(60, 80, random.Random(5))
        ours, theirs = (applied(each, image, boxes, labels, 5) for each in (transform, copy))
        assert torch.equal(ours[0], theirs[0])
