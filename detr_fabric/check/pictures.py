"""Pictures of a data set: samples with their boxes, and batches as training sees them.

Shapes: H×W pixels, N objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.check.histograms import histograms, shortened
from detr_fabric.config import Config
from detr_fabric.data.batch import IMAGENET_MEAN, IMAGENET_STD, MicroBatch, normalize
from detr_fabric.data.build import training_dataset
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import Annotations
from detr_fabric.data.formats.data_yaml import Split
from detr_fabric.data.loader import TrainLoader
from detr_fabric.data.transforms import resize, resize_boxes, size_of
from detr_fabric.draw import Boxes, Picture, draw, grid
from detr_fabric.errors import UserError
from detr_fabric.runtime.files import writing
from detr_fabric.terminal import noun, say

SAMPLES = 12  # images with their boxes
AUGMENTED = 8  # images of batches, at least
MOST = 16  # images of batches, at most
COLUMNS, SIDE = 4, 480  # pictures in a row, and the longest side of each in pixels
TITLES: dict[Split, str] = {"train": "training data", "val": "validation data"}
LABELLED = 20  # objects of an image, at most
STRIPE = 12  # width in pixels of the stripes on padding


def write_pictures(
    out: Path, split: Split, folder: Path, annotations: Annotations, config: Config, queries: int
) -> list[str]:
    """Writes the pictures of a split into `out`; returns their names. What can't be drawn, because images can't be
    read, is said.

    config: resolved; its augmentation, batch size and seed are those of training. Raises UserError where nothing can be
    written.
    """
    pictures: dict[str, Image.Image] = {}
    try:
        dataset = training_dataset(replace(config.data, bad_images="skip"), folder, annotations, config.train.seed)
        pictures[f"{split}_samples.png"] = samples(dataset)
        if split == "train":
            pictures["train_batches.png"] = batches(dataset, config)
    except UserError as error:
        say(f"  not drawn: {error}")
    with writing(f"--pictures {out}", "choose another folder"):
        for name, drawn in pictures.items():
            drawn.save(out / name)
        histograms(annotations, queries, TITLES[split]).savefig(out / f"{split}_histograms.png", dpi=110)
    return [*pictures, f"{split}_histograms.png"]


def samples(dataset: CocoDetection) -> Image.Image:
    """Images with their objects, as annotated, evenly spread over those that have any; crowds are left out."""
    known = dataset.annotations
    images = np.repeat(np.arange(len(dataset)), np.diff(known.offsets))
    candidates = np.unique(images[~known.crowd])
    pictures, captions, names = [], [], dataset.categories.legible_names()
    for place in range(min(SAMPLES, len(candidates))):
        index = int(candidates[place * len(candidates) // min(SAMPLES, len(candidates))])
        try:
            image, boxes, labels = dataset.load(index)
        except UserError:  # which the check has named
            continue
        height, width = size_of(image)
        pictures.append(picture(image, boxes, labels, names))
        captions.append(
            f"{short(str(known.file_names[index]))}, {width} x {height}, {len(labels)} {noun('object', len(labels))}"
        )
    if not pictures:
        raise UserError(f"no image with objects can be read from {dataset.folder}")
    legend = f"{len(pictures)} of {len(candidates):,} images with objects, as annotated"
    return grid(pictures, captions, COLUMNS, SIDE, legend)


def batches(dataset: CocoDetection, config: Config) -> Image.Image:
    """The first batches of training: augmented, padded, normalised, and turned back into pixels."""
    size = min(config.train.batch_size, len(dataset))
    loader = TrainLoader(dataset, batch_size=size, accumulate=1, data=replace(config.data, workers=0))
    steps = list(islice(loader.epoch(0), -(-AUGMENTED // size)))
    names = dataset.categories.legible_names()
    pictures, captions = [], []
    for number, micro_batch in enumerate([each for step in steps for each in step], 1):
        for image, target in zip(shown(micro_batch), micro_batch[1], strict=True):
            height, width = target.size
            boxes = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
            pictures.append(picture(image, boxes, target.labels, names))
            padded = f" in {image.shape[2]} x {image.shape[1]}" if target.size != size_of(image) else ""
            shape = f"{width} x {height}{padded}"
            name = short(str(target.image_id))
            captions.append(f"batch {number}: {name}, {shape}, {len(boxes)} {noun('object', len(boxes))}")
    padding = torch.cat([batch.mask.flatten() for step in steps for batch, _ in step]).float().mean()
    first = "the first batch" if len(steps) == 1 else f"the first {len(steps)} batches"
    kept = f", {MOST} images of it" if len(pictures) > MOST else ""
    legend = f"{first} of {size} images{kept}, as training sees them: {padding:.0%} of the pixels are padding (striped)"
    return grid(pictures[:MOST], captions[:MOST], COLUMNS, SIDE, legend)


def shown(micro_batch: MicroBatch) -> Tensor:
    """(B, 3, H, W) uint8: what the model gets, with stripes on the padding, which is the mean colour there."""
    batch = normalize(micro_batch[0])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = (255 * (batch.images * std + mean)).round()
    rows, columns = (torch.arange(side) for side in size_of(images))
    width = max(1, STRIPE * max(size_of(images)) // SIDE)
    stripes = (rows[:, None] + columns) // width % 2 * 48  # (H, W)
    return torch.where(batch.mask[:, None] & (stripes > 0), images + stripes, images).clamp(0, 255).to(torch.uint8)


def picture(image: Tensor, boxes: Tensor, labels: Tensor, names: Sequence[str]) -> Image.Image:
    """(3, H, W) uint8 with boxes (N, 4) xyxy in its pixels, at the size at which it is looked at."""
    old = size_of(image)
    scale = min(1.0, SIDE / max(old))
    new = (max(1, round(old[0] * scale)), max(1, round(old[1] * scale)))
    largest = (boxes[:, 2:] - boxes[:, :2]).prod(1).argsort(descending=True)  # whose names are written
    objects = Boxes(resize_boxes(boxes, old, new)[largest], labels[largest])
    return draw(Picture(resize(image, new), "", objects), [*map(shortened, names)], SIDE, LABELLED)


def short(name: str) -> str:
    """The end of a file's name."""
    name = name.rpartition("/")[2]
    return name if len(name) <= 20 else f"…{name[-19:]}"
