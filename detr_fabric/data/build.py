"""Data settings → data sets."""

from __future__ import annotations

from pathlib import Path

from detr_fabric.config import DataConfig
from detr_fabric.data import synthetic
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import Annotations, read_annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.formats.data_yaml import Split
from detr_fabric.data.formats.detect import root_paths
from detr_fabric.data.formats.other_classes import Matched, match_by_name
from detr_fabric.data.formats.split import split
from detr_fabric.data.own_augment import OwnAugment
from detr_fabric.data.transforms import EvalTransform, TrainTransform
from detr_fabric.errors import UserError


def build_datasets(data: DataConfig, seed: int) -> tuple[CocoDetection, CocoDetection]:
    """Training and validation data; `data` must be resolved (Config.resolve). Validation uses the training categories.

    Raises UserError, with the file or folder and the flag, if something is missing or wrong.
    """
    images, file = _paths(data, "train")
    annotations = read_annotations(file, None, data.label_space, images, "train").require_objects(file)
    if data.val_fraction is not None:
        annotations = split(annotations, data.val_fraction)[0].require_objects(file)
    annotations = annotations.first(data.train_limit, with_objects=True)
    train = training_dataset(data, images, annotations, seed)
    return train, build_validation(data, train.categories, seed)


def training_dataset(data: DataConfig, images: Path, annotations: Annotations, seed: int) -> CocoDetection:
    """Annotated images with the augmentation of training; `data` must be resolved. Raises UserError for a file of
    --data.augment that can't be used."""
    assert data.scales is not None and data.max_size is not None and data.crop is not None, "resolve the config first"
    original = data.augment == "original"
    flip, crop = (data.flip, data.crop) if original else (0.0, False)
    transform = TrainTransform(data.scales, data.max_size, flip, crop)
    train = CocoDetection(images, annotations, transform, seed, "next" if data.bad_images == "skip" else "stop")
    train.augment = None if original else OwnAugment(data.augment, train.categories.num_classes)
    return train


def build_validation(data: DataConfig, categories: Categories, seed: int) -> CocoDetection:
    """The images to evaluate on, with the evaluation transform and labels of `categories` (the training data's or a
    checkpoint's); `data` must be resolved. Raises UserError like build_datasets."""
    images, file = _paths(data, part := _part(data))
    return _validation(data, images, read_annotations(file, categories, data.label_space, images, part), seed)


def build_validation_by_name(data: DataConfig, categories: Categories, seed: int) -> tuple[CocoDetection, Matched]:
    """Like build_validation, for annotations of another data set: classes are matched by name, see match_by_name."""
    images, file = _paths(data, part := _part(data))
    matched = match_by_name(file, categories, images, part, data.aliases)
    return _validation(data, images, matched.annotations, seed), matched


def validation_file(data: DataConfig) -> Path:
    """The annotations of the images to evaluate on. Raises UserError where there are none."""
    return _paths(data, _part(data))[1]


def _part(data: DataConfig) -> Split:
    """Which split the images to evaluate on come from."""
    return "train" if data.validate_on_train or data.val_fraction is not None else "val"


def _validation(data: DataConfig, images: Path, annotations: Annotations, seed: int) -> CocoDetection:
    assert data.scales is not None and data.max_size is not None, "resolve the config first"
    if data.val_fraction is not None:
        _, annotations = split(annotations, data.val_fraction)
    if data.validate_on_train:
        annotations = annotations.first(data.train_limit, with_objects=True)
    annotations = annotations.first(data.val_limit, with_objects=False)
    transform = EvalTransform(data.scales[-1], data.max_size)
    return CocoDetection(images, annotations, transform, seed, "blank" if data.bad_images == "skip" else "stop")


def _paths(data: DataConfig, part: Split) -> tuple[Path, Path]:
    """The folder of images and the annotations of a split, which exist."""
    if data.builtin:
        root = synthetic.prepare(data.shapes_size, data.shapes_train, data.shapes_val, data.shapes_dir)
    else:
        root = Path(data.root or "")
    given = getattr(data, f"{part}_images"), getattr(data, f"{part}_annotations")
    found = given if all(given) else root_paths(root, part)
    images, annotations = (Path(mine or usual) for mine, usual in zip(given, found, strict=True))
    if not images.is_dir():
        raise UserError(f"{images} is no folder of images: set --data.root or --data.{part}-images")
    if not annotations.exists():
        raise UserError(f"{annotations} does not exist: set --data.root or --data.{part}-annotations")
    return images, annotations
