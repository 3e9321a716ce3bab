"""Detects the format of annotations (COCO JSON, Pascal VOC XML, YOLO text files) and reads them."""

from __future__ import annotations

from pathlib import Path

from detr_fabric.data.formats import voc, yolo
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.formats.coco import read_coco
from detr_fabric.data.formats.data_yaml import YAML, NoValidation, Split, split_images
from detr_fabric.data.formats.fields import Content
from detr_fabric.data.formats.files import walk
from detr_fabric.errors import UserError


def root_paths(root: Path, split: Split) -> tuple[Path, Path]:
    """The folder of images and the annotations of a split, in a folder with COCO's or Pascal VOC's layout, or as YOLO's
    data.yaml says; root: the folder, or data.yaml itself. Raises NoValidation if there is no such split."""
    if (root / voc.LISTS).is_dir():
        return root / "JPEGImages", root / voc.LISTS / f"{split}.txt"
    if (root / "JPEGImages").is_dir() and (root / "Annotations").is_dir():
        if split == "val":
            raise NoValidation(
                f"{root} has no {voc.LISTS}/val.txt: add both lists, or take validation images by --data.val-fraction"
            )
        return root / "JPEGImages", root / "Annotations"
    if (root / "data.yaml").is_file() and not (root / "annotations").exists():
        root = root / "data.yaml"
    if root.suffix in YAML:
        return split_images(root, split)[0], root
    return root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"


def is_folder_of_annotations(path: Path) -> bool:
    """Whether a path is a folder with Pascal VOC or YOLO annotations."""
    return path.is_dir() and any(walk(path, (".xml", ".txt")))


def read_content(
    path: Path,
    images: Path | None = None,
    training: Categories | None = None,
    split: Split | None = None,
    polygons: bool = False,
) -> Content:
    """The content of a COCO annotation file, or of another format converted to it: a folder of Pascal VOC XML files or
    a list of them (ImageSets/Main/train.txt), a folder of YOLO text files, or a data.yaml.

    images: the folder of images, which YOLO needs; training: categories whose ids VOC and YOLO classes of the same name
    get; split: which images of data.yaml; polygons: keep COCO's polygons. Raises UserError, naming file and place, for
    what can't be read.
    """
    if path.suffix in YAML:
        return yolo.read_yolo(path, images, training, split)
    if path.suffix == ".txt":
        return voc.read_voc(path, images, training)
    if not path.is_dir():
        return read_coco(path, images, training, polygons)
    if not is_folder_of_annotations(path):
        raise UserError(
            f"{path} is a folder without .xml files (Pascal VOC) and without .txt files (YOLO): name one with them, or "
            "a COCO JSON"
        )
    if any(walk(path, (".xml",))):
        return voc.read_voc(path, images, training)
    return yolo.read_yolo(path, images, training)
