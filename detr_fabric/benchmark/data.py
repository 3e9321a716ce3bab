"""Training images from file to collated batch: ours on uint8 beside the classic path over PIL and floats."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from detr_fabric.benchmark.measure import Call, PartResult, interleaved, rows
from detr_fabric.config import COCO_SCALES
from detr_fabric.data.batch import IMAGENET_MEAN, IMAGENET_STD, ImageBatch, normalize
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import clip_boxes, read_annotations
from detr_fabric.data.loader import load_batch
from detr_fabric.data.transforms import CROP_SCALES, CROP_SIDES, EvalTransform, TrainTransform, resized_size
from detr_fabric.errors import UserError

BATCH, MAX_SIZE, SEED = 4, 1333, 0
SIZES = ((480, 640), (480, 640), (640, 480), (427, 640))  # height, width, of most images of COCO

Augment = Callable[[Image.Image, Tensor, random.Random], tuple[Image.Image, Tensor]]


def measure(device: torch.device, quick: bool, root: Path | None = None) -> PartResult:
    """Times per image on the CPU, whatever the device, and `apart`: the largest difference of the two paths' pixels, in
    255ths of their range.

    root: a folder in COCO's layout, whose first training images are read; None: images made here, of COCO's sizes.
    """
    count = BATCH if quick else 8 * BATCH
    found = []
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            root = Path(folder)
            write_images(root, count)
        for case, transform, augment in (
            ("training", TrainTransform(COCO_SCALES, MAX_SIZE, 0.5, True), augment_classic),
            ("evaluation", EvalTransform(COCO_SCALES[-1], MAX_SIZE), resize_classic),
        ):
            file = root / "annotations" / "instances_train2017.json"
            annotations = read_annotations(file).first(count, with_objects=True)
            if len(annotations) < BATCH:
                raise UserError(f"{file} has fewer than {BATCH} images with objects: give a larger data set")
            data = CocoDetection(root / "train2017", annotations, transform, SEED)
            batches = [list(range(i, i + BATCH)) for i in range(0, len(data) - BATCH + 1, BATCH)]
            loaders: dict[str, Callable[..., ImageBatch]] = {
                "ours": load,
                "classic": partial(load_classic, augment=augment),
            }
            calls = {name: _epochs(loader, data, batches) for name, loader in loaders.items()}
            times = interleaved(calls, 0.5 if quick else 20, torch.device("cpu"))
            apart = max(_apart(load(data, 0, batch), load_classic(data, 0, batch, augment)) for batch in batches)
            images = BATCH * len(batches)
            found += [row | {"apart": apart} for row in rows(f"{case}, {images} images", times, images, "image")]
    return PartResult(found)


def _epochs(load: Callable[..., ImageBatch], data: CocoDetection, batches: list[list[int]]) -> Call:
    """One pass over the batches a call, each with the augmentation of the next epoch."""
    epochs = itertools.count()

    def call() -> None:
        epoch = next(epochs)
        for batch in batches:
            load(data, epoch, batch)

    return call


def _apart(ours: ImageBatch, theirs: ImageBatch) -> float:
    assert torch.equal(ours.mask, theirs.mask)
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    return 255 * float(((normalize(ours).images - theirs.images) * std).abs().max())


def load(data: CocoDetection, epoch: int, batch: list[int]) -> ImageBatch:
    """Ours: uint8 until the batch is on the device."""
    ((images, _),) = load_batch(data, [(epoch, index) for index in batch])
    return images


def load_classic(data: CocoDetection, epoch: int, batch: list[int], augment: Augment) -> ImageBatch:
    """The original's path: PIL transforms, to_tensor, normalise, padded as floats; random choices are those of ours."""
    images = []
    for index in batch:
        file = data.folder / str(data.annotations.file_names[index])
        image = Image.open(file).convert("RGB")
        boxes = clip_boxes(data.annotations.boxes[data.annotations.objects(index)], image.height, image.width)
        image, _ = augment(image, torch.from_numpy(boxes), random.Random(f"{SEED}-{epoch}-{index}"))
        images.append(F.normalize(F.to_tensor(image), list(IMAGENET_MEAN), list(IMAGENET_STD)))
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    padded, mask = torch.zeros(len(images), 3, height, width), torch.ones(len(images), height, width, dtype=torch.bool)
    for image, pixels, padding in zip(images, padded, mask, strict=True):
        pixels[:, : image.shape[1], : image.shape[2]].copy_(image)
        padding[: image.shape[1], : image.shape[2]] = False
    return ImageBatch(padded, mask)


def augment_classic(image: Image.Image, boxes: Tensor, rng: random.Random) -> tuple[Image.Image, Tensor]:
    """Flip, and resize, half the time after a resize and a crop."""
    if rng.random() < 0.5:
        image = F.hflip(image)
        boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([image.width, 0, image.width, 0])
    if rng.random() >= 0.5:
        image, boxes = _resize(image, boxes, rng.choice(CROP_SCALES), None)
        (low, high), (full_width, full_height) = CROP_SIDES, image.size
        width = rng.randint(min(low, full_width), min(full_width, high))
        height = rng.randint(min(low, full_height), min(full_height, high))
        top, left = rng.randint(0, full_height - height), rng.randint(0, full_width - width)
        image = F.crop(image, top, left, height, width)
        boxes = (boxes - torch.tensor([left, top, left, top])).clamp(min=0)
        boxes = torch.minimum(boxes, torch.tensor([width, height, width, height]))
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    return _resize(image, boxes, rng.choice(COCO_SCALES), MAX_SIZE)


def resize_classic(image: Image.Image, boxes: Tensor, rng: random.Random) -> tuple[Image.Image, Tensor]:
    return _resize(image, boxes, COCO_SCALES[-1], MAX_SIZE)


def _resize(image: Image.Image, boxes: Tensor, size: int, max_size: int | None) -> tuple[Image.Image, Tensor]:
    height, width = resized_size(image.height, image.width, size, max_size)
    x, y = width / image.width, height / image.height
    return F.resize(image, [height, width]), boxes * torch.tensor([x, y, x, y])


def write_images(root: Path, count: int, entries: int | None = None) -> None:
    """JPEGs as most of COCO's are, of its sizes and without subsampled colours, each with its mean of 7 objects. Their
    spectrum, amplitude 1/f^1.4, is such that files have COCO's mean size, 163 kB: it decides what decoding costs.

    entries: number of images that the annotations list, where it is another one: they share the files."""
    rng = np.random.default_rng(SEED)
    (root / "train2017").mkdir()
    (root / "annotations").mkdir()
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))[..., None]
        spectrum = np.fft.fft2(rng.standard_normal((height, width, 3)), axes=(0, 1)) / (frequency + 1 / width) ** 1.4
        grey_and_colour = np.fft.ifft2(spectrum, axes=(0, 1)).real @ np.array(
            [[1, 1, 1], [0.2, 0, -0.2], [0, 0.2, -0.2]]
        )
        pixels = 120 + 60 * grey_and_colour / grey_and_colour.std()
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(root / "train2017" / f"{number}.jpg", quality=90, subsampling="4:4:4")
    images, objects = [], []
    for number in range(entries or count):
        height, width = SIZES[number % count % len(SIZES)]
        images.append({"id": number, "file_name": f"{number % count}.jpg", "height": height, "width": width})
        objects += [{"image_id": number, "category_id": 1, "bbox": [20 * i, 30 * i, 200, 150]} for i in range(7)]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
