"""The data set beside the original's logic, and its ground truth beside a clean twin's scores."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detr_fabric.data import images as image_files
from detr_fabric.data.build import build_datasets, build_validation
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.ground_truth import ground_truth
from detr_fabric.data.transforms import EvalTransform, TrainTransform
from detr_fabric.errors import UserError
from detr_fabric.evaluate.coco import Backend, Detections, Scores, score
from tests.batches import resolved
from tests.coco_files import DAMAGE, coco, image, thing, write_images, write_json


def dataset(folder: Path, content: dict[str, Any], scale: int = 30) -> CocoDetection:
    """The data set of `content` with images of noise, at evaluation scale."""
    annotations = read_annotations(write_json(folder / "instances.json", content))
    return CocoDetection(write_images(folder / "images", content), annotations, EvalTransform(scale, 1333), seed=0)


# The original's logic, written out: ConvertCocoPolysToMask, then RandomResize([800], max_size=1333), then Normalize.


def original_objects(annotations: list[dict[str, Any]], width: int, height: int) -> tuple[Tensor, Tensor]:
    annotations = [row for row in annotations if "iscrowd" not in row or row["iscrowd"] == 0]
    boxes = torch.as_tensor([row["bbox"] for row in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(min=0, max=width)
    boxes[:, 1::2].clamp_(min=0, max=height)
    classes = torch.tensor([row["category_id"] for row in annotations], dtype=torch.int64)
    keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
    return boxes[keep], classes[keep]


def original_resize(picture: Image.Image, boxes: Tensor, size: int, max_size: int) -> tuple[Image.Image, Tensor]:
    w, h = picture.size
    low, high = float(min(w, h)), float(max(w, h))
    if high / low * size > max_size:
        size = int(round(max_size * low / high))
    if not ((w <= h and w == size) or (h <= w and h == size)):
        new = (size, int(size * h / w)) if w < h else (int(size * w / h), size)
        resized = picture.resize(new, Image.Resampling.BILINEAR)
    else:
        resized = picture
    x, y = (float(s) / float(s_orig) for s, s_orig in zip(resized.size, picture.size, strict=True))
    return resized, boxes * torch.as_tensor([x, y, x, y])


def original_normalised(boxes: Tensor, width: int, height: int) -> Tensor:
    x0, y0, x1, y1 = boxes.unbind(-1)
    centred = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
    return centred / torch.tensor([width, height, width, height], dtype=torch.float32)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_images_and_targets_are_the_originals(coco_mini: Path, split: str) -> None:
    from pycocotools.coco import COCO

    reference = COCO(coco_mini / "annotations" / f"instances_{split}2017.json")
    val = build_validation(
        resolved(root=str(coco_mini), label_space="coco91", validate_on_train=split == "train"),
        build_datasets(resolved(root=str(coco_mini), label_space="coco91"), 0)[0].categories,
        seed=0,
    )
    # validate_on_train keeps images without objects too: without a limit nothing is left out.
    assert val.image_ids == sorted(reference.imgs)
    for index, image_id in enumerate(val.image_ids):
        picture = Image.open(coco_mini / f"{split}2017" / reference.imgs[image_id]["file_name"]).convert("RGB")
        boxes, labels = original_objects(
            reference.loadAnns(reference.getAnnIds(imgIds=[image_id])), picture.width, picture.height
        )
        raw, our_boxes, _ = val.load(index)
        assert torch.equal(raw.permute(1, 2, 0), torch.from_numpy(np.array(picture)))
        assert torch.equal(our_boxes, boxes)
        if index % 4 == 0:  # resizing with Pillow is slow
            ours, target = val[(0, index)]
            resized, boxes = original_resize(picture, boxes, 800, 1333)
            assert tuple(ours.shape[-2:]) == target.size == (resized.height, resized.width)
            assert target.orig_size == (picture.height, picture.width)
            difference = (ours.permute(1, 2, 0).int() - torch.from_numpy(np.array(resized)).int()).abs()
            assert difference.max() <= 1 and difference.float().mean() < 0.4
            assert torch.equal(target.boxes, original_normalised(boxes, resized.width, resized.height))
            assert torch.equal(target.labels, labels)


def test_real_training_samples_have_boxes_inside_the_image(coco_mini: Path) -> None:
    train, _ = build_datasets(resolved(root=str(coco_mini)), seed=0)
    assert len(train) == 80 and train.categories.num_classes == 80
    for index in range(0, 80, 8):
        pixels, target = train[(3, index)]
        assert pixels.dtype == torch.uint8 and max(pixels.shape) <= 1333 and min(pixels.shape[-2:]) >= 300
        left_top, right_bottom = (
            target.boxes[:, :2] - target.boxes[:, 2:] / 2,
            target.boxes[:, :2] + target.boxes[:, 2:] / 2,
        )
        assert (left_top > -1e-5).all() and (right_bottom < 1 + 1e-5).all() and (target.boxes[:, 2:] > 0).all()


def test_strange_boxes_become_the_originals_targets(tmp_path: Path) -> None:
    boxes = [
        [-5, -5, 20, 20],
        [30, 20, 99, 99],
        [0.1, 0.2, 39.95, 29.9],
        [39.9, 1, 50, 0.3],
        [5, 5, 0, 9],
        [50, 5, 9, 9],
    ]
    things = [thing(n, 1, box=box, category=1 + n % 2) for n, box in enumerate(boxes)] + [thing(9, 1, iscrowd=1)]
    data = dataset(tmp_path, coco(None, things))
    expected, labels = original_objects(things, 40, 30)
    _, target = data[(0, 0)]
    assert torch.equal(target.boxes, original_normalised(expected, 40, 30))
    assert torch.equal(target.labels, labels - 1)
    assert len(target.labels) == 4 and data.annotations.dropped == 2


def test_images_without_objects_or_with_crowds_only_are_kept(tmp_path: Path) -> None:
    data = dataset(tmp_path, coco([image(1), image(2)], [thing(1, 2, iscrowd=1)]))
    assert len(data) == 2
    for index in range(2):
        _, target = data[(0, index)]
        assert target.boxes.shape == (0, 4) and target.labels.shape == (0,)
        assert target.boxes.dtype == torch.float32 and target.labels.dtype == torch.int64


def test_targets_carry_the_data_sets_own_image_id(tmp_path: Path) -> None:
    for number, ids in enumerate(([700, 3], ["b", "a"])):
        data = dataset(tmp_path / str(number), coco([image(id) for id in ids], []))
        assert data.image_ids == sorted(ids)
        assert [data[(0, index)][1].image_id for index in range(2)] == sorted(ids)
        assert type(data[(0, 0)][1].image_id) is type(ids[0])


def test_augmentation_depends_on_seed_epoch_and_index_only(tmp_path: Path) -> None:
    data = dataset(tmp_path, coco([image(n) for n in range(3)], [thing(1, 0)]))
    data.transform = TrainTransform((20, 25, 30, 35, 40), 100, 0.5, crop=True)
    first = data[(4, 0)]
    data[(5, 2)]
    random.seed(3)
    torch.manual_seed(3)
    again = data[(4, 0)]
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].boxes, again[1].boxes)
    pictures = [data[(epoch, 0)][0] for epoch in range(12)]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(pictures, pictures[1:], strict=False))
    other = CocoDetection(data.folder, data.annotations, data.transform, seed=1)
    seeds_differ = [a.shape != b.shape for a, b in ((data[(e, 0)][0], other[(e, 0)][0]) for e in range(12))]
    assert any(seeds_differ)


def test_ground_truth_is_renumbered_and_the_same_for_strange_ids(tmp_path: Path) -> None:
    clean = dataset(tmp_path / "clean", coco([image(1), image(2)], [thing(1, 1), thing(2, 2, category=2, iscrowd=1)]))
    strange = coco(
        [image("a", file_name="1.png"), image("b", file_name="2.png")],
        [thing(0, "a", category=0, area=200.0, iscrowd=0), thing(10**15, "b", category=77, iscrowd=1)],
        [{"id": 77, "name": "dog"}, {"id": 0, "name": "cat"}],
    )
    truth = ground_truth(dataset(tmp_path / "strange", strange).annotations)
    assert truth == ground_truth(clean.annotations)
    assert [entry["id"] for entry in truth["images"]] == [1, 2]
    assert [(entry["id"], entry["name"]) for entry in truth["categories"]] == [(1, "cat"), (2, "dog")]
    assert truth["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 5, 20, 10], "area": 200, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [10, 5, 20, 10], "area": 200, "iscrowd": 1},
    ]


STRANGE: dict[str, Any] = {  # a change of nothing but what is written in the file
    "gaps": {"image": lambda n: 7 + 1000 * n, "thing": lambda n: 3 + 9 * n, "category": lambda n: 50 * n},
    "from 0": {"image": lambda n: n, "thing": lambda n: n, "category": lambda n: n - 1},
    "huge": {"image": lambda n: 2**62 + n, "thing": lambda n: 10**15 + n, "category": lambda n: 2**40 + n},
    "strings": {"image": lambda n: f"photo {n:02}", "thing": lambda n: f"box {n}", "category": lambda n: f"c{n}"},
    "missing area": {"without": ("area",)},
    "missing iscrowd": {"without": ("iscrowd",)},
    "missing both": {"without": ("area", "iscrowd")},
    "no annotation ids": {"without": ("id",)},
}


def scores_of(folder: Path, content: dict[str, Any]) -> list[Scores]:
    """Scores, by both libraries, of detections that are the objects, some moved, some of another class, some missed."""
    annotations = read_annotations(write_json(folder / "instances.json", content))
    data = CocoDetection(folder, annotations, EvalTransform(30, 1333), seed=0)
    rng = np.random.default_rng(0)
    detections = []
    for index, image_id in enumerate(data.image_ids):
        objects = slice(index * 3, index * 3 + 3)
        boxes = np.array(OBJECTS[objects], dtype=float)
        boxes[:, 2:] += boxes[:, :2] + rng.normal(0, 1.5, (3, 2))
        labels = (np.arange(3) + (rng.random(3) < 0.3)) % 2
        found = (torch.from_numpy(rng.random(3)), torch.from_numpy(labels), torch.from_numpy(boxes))
        detections.append(Detections(image_id, *found))
    return [score(ground_truth(data.annotations), data.image_ids, detections, backend) for backend in BACKENDS]


BACKENDS: tuple[Backend, ...] = ("pycocotools", "hotcoco")
OBJECTS = [[3 + n % 5, 2 + n % 3, 12 + n % 11, 9 + n % 7] for n in range(30)]


def twin(crowds: bool = False, image: Any = None, thing: Any = None, category: Any = None, without: Any = ()) -> Any:
    """Ten images of three objects each; ids as the functions say, some keys left out."""
    same = lambda n: n  # noqa: E731
    image, thing, category = image or same, thing or same, category or same
    things = [
        {
            "id": thing(n),
            "image_id": image(n // 3),
            "category_id": category(1 + n % 3 % 2),
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(crowds),
        }
        for n, box in enumerate(OBJECTS)
    ]
    things = [{key: value for key, value in entry.items() if key not in without} for entry in things]
    images = [{"id": image(n), "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(10)]
    return coco(images, things, [{"id": category(n), "name": f"class {n}"} for n in (1, 2)])


@pytest.mark.parametrize("case", STRANGE)
def test_ap_equals_a_clean_twins(tmp_path: Path, case: str) -> None:
    clean, strange = scores_of(tmp_path, twin()), scores_of(tmp_path, twin(**STRANGE[case]))
    assert clean == strange and 0.1 < clean[0].stats["AP"] < 0.9
    assert clean[0].stats == pytest.approx(clean[1].stats, abs=1e-12)


@pytest.mark.parametrize(
    "content", [twin(crowds=True), twin() | {"annotations": []}], ids=["crowds only", "no objects"]
)
def test_without_objects_ap_is_undefined_and_said_so(tmp_path: Path, content: dict[str, Any]) -> None:
    for scores in scores_of(tmp_path, content):
        assert set(scores.stats.values()) == {-1} and scores.per_class == {}


def test_a_data_set_can_be_sent_to_spawned_workers(tmp_path: Path) -> None:
    data = dataset(tmp_path, coco())
    copied = pickle.loads(pickle.dumps(data))
    assert torch.equal(copied[(0, 1)][0], data[(0, 1)][0])
    assert copied.categories == data.categories


@pytest.mark.parametrize(
    ("fault", "expected"),
    {
        "missing": "does not exist: restore",
        "empty": "is empty: replace",
        "truncated": "replace the file",
        "web page": "is no JPEG",
        "other size": "height 40, but 30 in the annotations",
        "bomb": "pixels: scale it down",
    }.items(),
)
def test_bad_images_are_refused_with_id_path_and_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, expected: str
) -> None:
    monkeypatch.setattr(image_files, "RETRY_SECONDS", ())
    data = dataset(tmp_path, coco([image(1), image(4711)], []))
    DAMAGE[fault](tmp_path / "images" / "4711.png")
    data[(0, 0)]
    with pytest.raises(UserError, match=rf"image 4711: .*4711\.png .*{expected}.*, or set --data.bad-images skip"):
        data[(0, 1)]


def test_entries_without_a_size_accept_any_image(tmp_path: Path) -> None:
    data = dataset(tmp_path, coco([{"id": 1, "file_name": "a.png"}], [thing(1, 1, box=[30, 5, 50, 5])]))
    assert data[(0, 0)][1].boxes[0].tolist() == pytest.approx([35 / 40, 7.5 / 30, 10 / 40, 5 / 30])
