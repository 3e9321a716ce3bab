"""Augmentation by a function of one's own: what it draws, where boxes go, and every mistake of its file."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.data.batch import Target
from detr_fabric.data.build import build_datasets
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.own_augment import OwnAugment
from detr_fabric.data.transforms import TrainTransform
from detr_fabric.errors import UserError
from detr_fabric.runtime.preflight import largest_shapes
from tests.batches import assert_same, resolved, train_loader
from tests.coco_files import coco, image, thing, write_images, write_json, write_root
from tests.commands import REPOSITORY

EXAMPLE = str(REPOSITORY / "experiments" / "augment_example.py")
V2 = """import random, numpy as np, torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
"""
MOVES = '{}\ndef augment(image, target):\n    return move(image), target | {{"boxes": move(target["boxes"])}}\n'  # both
RESIZED = TrainTransform((60,), 100, flip=0.0, crop=False)


def content() -> dict[str, Any]:
    """Four images of 80 x 60 pixels: with two objects, one, one of the other class, and none."""
    things = [thing(1, 1, box=(10, 5, 20, 10)), thing(2, 1, category=2, box=(50, 30, 30, 30))]
    things += [thing(3, 2, box=(0, 0, 80, 60)), thing(4, 3, category=2, box=(3, 4, 5, 6))]
    return coco() | {"images": [image(n, height=60, width=80) for n in (1, 2, 3, 4)], "annotations": things}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_json(folder / "a.json", content())
    write_images(folder / "images", content())
    return folder


def data(folder: Path, source: str | None = None, transform: TrainTransform = RESIZED) -> CocoDetection:
    """The images, augmented by a file of this source."""
    dataset = CocoDetection(folder / "images", read_annotations(folder / "a.json"), transform, seed=7)
    if source is not None:
        (folder / "mine.py").write_text(V2 + source)
        dataset.augment = OwnAugment(str(folder / "mine.py"), dataset.categories.num_classes)
    return dataset


def pixels(target: Target) -> Tensor:
    """Its boxes as xyxy in pixels."""
    return cxcywh_to_xyxy(target.boxes) * torch.tensor([target.size[1], target.size[0]]).repeat(2)


def same(one: tuple[Tensor, Target], other: tuple[Tensor, Target]) -> bool:
    tensors = ((one[0], other[0]), (one[1].boxes, other[1].boxes), (one[1].labels, other[1].labels))
    return all(torch.equal(a, b) for a, b in tensors) and one[1][2:] == other[1][2:]


# ---- the example


def test_the_example_gives_valid_samples_that_are_functions_of_seed_epoch_and_index(folder: Path) -> None:
    scenes, other_seed = data(folder), data(folder)
    scenes.augment = other_seed.augment = OwnAugment(EXAMPLE, 2)
    other_seed.seed = 8
    counts = set()
    for index in range(4):
        samples = [scenes[(epoch, index)] for epoch in range(12)]
        for picture, target in samples:
            assert picture.shape[1:] == target.size and min(target.size) == 60 and max(target.size) <= 100
            assert target.orig_size == (60, 80) and len(target.labels) == len(target.boxes)
            boxes = pixels(target)
            assert (boxes >= -1e-3).all() and (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes[:, 2:] <= torch.tensor([target.size[1], target.size[0]]) + 1e-3).all()
        counts |= {(index, len(target.labels)) for _, target in samples}
        assert all(same(scenes[(epoch, index)], samples[epoch]) for epoch in range(3))
        assert not all(same(scenes[(0, index)], sample) for sample in samples)
        assert not all(same(other_seed[(epoch, index)], samples[epoch]) for epoch in range(12))
    assert counts >= {(0, 2), (0, 1), (1, 1), (2, 1), (3, 0)}


def test_it_takes_the_place_of_the_originals_flip_and_crop_and_the_resize_stays(tmp_path: Path) -> None:
    root = str(write_root(tmp_path, content(), content()))
    original, validation = build_datasets(resolved(root=root), 7)
    assert original.augment is None and original.transform == TrainTransform((*range(480, 801, 32),), 1333, 0.5, True)
    mine, validation = build_datasets(resolved(root=root, augment=EXAMPLE), 7)
    assert mine.augment is not None and mine.augment.source == f"--data.augment {EXAMPLE}"
    assert mine.transform == TrainTransform((*range(480, 801, 32),), 1333, 0.0, False)
    assert validation.augment is None


def test_loader_processes_change_nothing(folder: Path) -> None:
    scenes = data(folder)
    scenes.augment = OwnAugment(EXAMPLE, 2)
    batches = [list(train_loader(scenes, 2, 1, workers=workers).epoch(3)) for workers in (0, 2)]
    assert_same(*batches)
    again = pickle.loads(pickle.dumps(scenes))  # what a worker that is not forked gets
    assert same(again[(3, 0)], scenes[(3, 0)]) and again.augment.digest == scenes.augment.digest


# ---- draws


@pytest.mark.parametrize("draw", ["torch.rand(()).item()", "random.random()", "np.random.rand()"])
def test_every_global_generator_is_seeded_within_and_goes_on_afterwards_as_if_nothing_had_been_drawn(
    folder: Path, draw: str
) -> None:
    drawn: list[float] = []
    scenes = data(folder, f"def augment(image, target):\n    drawn.append({draw})\n    return image, target\n")
    scenes.augment.function.__globals__["drawn"] = drawn  # type: ignore[union-attr, attr-defined]

    def outside() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.rand()]

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    undisturbed = [outside(), outside()]
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    disturbed = [outside()]
    for key in ((0, 0), (0, 1), (1, 0), (0, 0)):
        scenes[key]
    assert [*disturbed, outside()] == undisturbed
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3


# ---- boxes


def test_a_flip_by_torchvision_equals_the_originals_to_the_last_bit(folder: Path) -> None:
    flipped = data(folder, "augment = v2.RandomHorizontalFlip(p=1)\n")
    original = data(folder, transform=TrainTransform((60,), 100, flip=1.0, crop=False))
    assert all(same(flipped[(0, index)], original[(0, index)]) for index in range(4))


def test_boxes_end_at_the_edge_and_those_left_without_area_go_with_their_labels(folder: Path) -> None:
    """Of image 1 the left 40 x 60 pixels, in which the second object has no part; enlarged to 60 x 90."""
    for plain in ("", ".as_subclass(torch.Tensor)"):
        scenes = data(folder, MOVES.format(f"move = lambda x: F.crop(x, 0, 0, 60, 40){plain}"))
        picture, target = scenes[(0, 0)]
        assert picture.shape == (3, 90, 60) and target.size == (90, 60) and target.labels.tolist() == [0]
        torch.testing.assert_close(pixels(target), torch.tensor([[15.0, 7.5, 45.0, 22.5]]))
        torch.testing.assert_close(pixels(scenes[(0, 1)][1]), torch.tensor([[0.0, 0.0, 60.0, 90.0]]))


def test_boxes_that_reach_beyond_the_image_are_cut_off(folder: Path) -> None:
    moved = 'target | {"boxes": target["boxes"].as_subclass(torch.Tensor) + 45}'
    scenes = data(folder, f"def augment(image, target):\n    return image, {moved}\n")
    torch.testing.assert_close(pixels(scenes[(0, 0)][1]), torch.tensor([[55.0, 50.0, 75.0, 60.0]]))


@pytest.mark.parametrize("form", ["XYWH", "CXCYWH"])
def test_boxes_may_come_back_in_another_format(folder: Path, form: str) -> None:
    scenes = data(folder, f'augment = v2.ConvertBoundingBoxFormat("{form}")\n')
    torch.testing.assert_close(pixels(scenes[(0, 0)][1]), pixels(data(folder)[(0, 0)][1]))


def test_images_of_any_layout_fill_a_batch(folder: Path) -> None:
    scenes = data(folder, MOVES.format("move = lambda x: F.rotate(x, 90, expand=True)"))
    for step in train_loader(scenes, 2, 1).epoch(0):
        for batch, targets in step:
            assert batch.images.shape == (2, 3, 80, 60) and all(target.size == (80, 60) for target in targets)
    for degrees in (10, 20, 30, 40):  # where torchvision rounds the sizes of image and boxes differently
        data(folder, MOVES.format(f"move = lambda x: F.rotate(x, {degrees}, expand=True)"))[(0, 0)]


# ---- mistakes


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("augment = 3\n", "define augment(image, target) in it"),
        ("def augmentation(image, target): ...\n", "define augment(image, target) in it"),
        ("def augment(:\n", "SyntaxError"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def augment(image): return image\n", "augment on image 1: TypeError: "),
        ("def augment(image, target): 1 / 0\n", "augment on image 1: ZeroDivisionError: division by zero"),
        ("def augment(image, target): raise ValueError('one\\ntwo')\n", "ValueError: one two"),
        ("def augment(image, target): return None\n", "it returned NoneType, not what it was given"),
        ("def augment(image, target): return image\n", "it returned Image, not what it was given"),
        ("def augment(image, target): return image, {}\n", "it returned tuple, not what it was given"),
        ("augment = v2.ToDtype(torch.float32, scale=True)\n", "its image is torch.float32 (3, 60, 80): return uint8"),
        ("augment = v2.Grayscale()\n", "its image is torch.uint8 (1, 60, 80): return uint8"),
        (
            "def augment(image, target): return v2.Resize((30, 40))(image), target\n",
            "boxes are of an image of (60, 80)",
        ),
        (
            "def augment(image, target): return image, target | {'labels': target['labels'][:1]}\n",
            "without those of the",
        ),
        ("def augment(image, target): return image, target | {'labels': target['labels'].float()}\n", "int64 labels"),
        ("def augment(image, target): return image, target | {'labels': target['labels'] + 1}\n", "outside 0 to 1"),
        ("def augment(image, target): return image, target | {'boxes': target['boxes'][:, [2, 1, 0, 3]]}\n", "xyxy"),
        (
            "def augment(image, target): return image, target | {'boxes': target['boxes'] * float('nan')}\n",
            "not finite",
        ),
        ("def augment(image, target): return image, target | {'boxes': target['boxes'][0]}\n", "boxes are (4,)"),
    ],
)
def test_every_mistake_is_one_sentence_that_names_the_file(folder: Path, source: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        data(folder, source)[(0, 0)]
    sentence = str(caught.value)
    assert sentence.startswith(f"--data.augment {folder / 'mine.py'}: ") and "\n" not in sentence
    assert words in sentence, sentence


@pytest.mark.parametrize("file", ["nowhere.py", "orignal", "."])
def test_a_file_that_cannot_be_read_is_one_sentence(folder: Path, file: str) -> None:
    with pytest.raises(UserError, match=f"--data.augment .*{file}: .*; give a Python file, or original"):
        OwnAugment(str(folder / file), 2)


# ---- memory


def test_the_largest_batch_is_one_of_any_shape() -> None:
    sizes = np.array([[60, 80]])
    assert largest_shapes(resolved(root="coco", crop=False), sizes)[0] == (800, 1066)
    assert largest_shapes(resolved(root="coco", crop=False, augment="a.py"), sizes)[0] in ((800, 1333), (1333, 800))
