"""Reported cases of data: each is read right, or refused with the reason, or what is doubtful about it is said.

Training's part of a case is what training does before its first step: it builds its data sets.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageOps

from detr_fabric.config import Config, DataConfig
from detr_fabric.data.build import build_datasets
from detr_fabric.data.doubts import doubts
from detr_fabric.data.formats.annotations import Annotations, read_annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.summary import summary
from detr_fabric.errors import UserError
from detr_fabric.predict.paths import find_images
from tests.reported.runs import base, command, see


def config(**data: Any) -> Config:
    return Config(data=DataConfig(**{key: str(value) for key, value in data.items()})).resolve()


def train(**data: Any) -> list[Annotations]:
    """The training and validation annotations that training builds."""
    return [part.annotations for part in build_datasets(config(**data).data, 0)]


def refusal(read: Callable[[], object]) -> str:
    try:
        read()
    except UserError as error:
        return str(error)
    return ""


def said(data: Annotations) -> str:
    """What training says about annotations when it starts."""
    return "\n".join([summary(data, 100), *data.notes, *doubts(data)])


def files(data: Annotations) -> list[str]:
    return data.file_names.tolist()


def voc(folder: Path) -> Annotations:
    return read_annotations(folder / "Annotations", images=folder / "JPEGImages")


def coco(folder: Path) -> Annotations:
    return read_annotations(folder / "a.json", images=folder.parent / "_img").require_objects(folder / "a.json")


def first_values(folder: Path) -> np.ndarray:
    """(M, 4) boxes of label files by the first four numbers of each line, of images of 160 x 120."""
    lines = [line for file in sorted(folder.glob("*.txt")) for line in file.read_text().splitlines()]
    x, y, w, h = np.array([[float(value) for value in line.split()[1:5]] for line in lines]).T
    return np.stack([(x - w / 2) * 160, (y - h / 2) * 120, w * 160, h * 120], axis=1)


def corners(folder: Path) -> np.ndarray:
    """(M, 4) boxes of XML files, by their corners as they are written."""
    boxes = [box for file in sorted(folder.glob("*.xml")) for box in ElementTree.parse(file).iter("bndbox")]
    found = np.array([[float(box.findtext(key) or "nan") for key in ("xmin", "ymin", "xmax", "ymax")] for box in boxes])
    return np.concatenate([found[:, :2], found[:, 2:] - found[:, :2]], axis=1)


def twice_by_two_ids(folder: Path) -> bool:
    data = read_annotations(folder / "ImageSets" / "Main" / "train.txt", images=folder / "JPEGImages")
    left = [data.boxes[data.objects(index)][0, 0] for index in range(2)]
    return (
        data.image_ids.tolist() == ["a/0001", "b/0001"]
        and files(data) == ["a/0001.jpg", "b/0001.jpg"]
        and left[1] == 108
    )


def by_name(folder: Path) -> bool:
    training = read_annotations(folder / "train" / "_annotations.coco.json")
    found = read_annotations(folder / "data.yaml", training.categories, images=folder / "valid" / "images")
    return training.categories == Categories((1,), ("fish",)) and set(found.labels.tolist()) == {0}


def names(data: Annotations) -> list[str]:
    return [data.categories.name(label) for label in data.categories.labels.values()]


def turned_boxes(folder: Path) -> bool:
    """Whether boxes are those of the turned view, in which the truth is written, and so are the pixels."""
    truth = {stem: rows for stem, rows in json.loads((folder / "truth.json").read_text()).items()}
    for part in build_datasets(config(root=folder).data, 0):
        for index, name in enumerate(part.annotations.file_names.tolist()):
            image, boxes, _ = part.load(index)
            shown = ImageOps.exif_transpose(Image.open(part.folder / name))
            x, y, w, h = np.array([row[1:] for row in truth[Path(name).stem]], dtype=float).T
            if image.shape[1:] != shown.size[::-1] or not np.allclose(boxes, np.stack([x, y, x + w, y + h], 1), atol=1):
                return False
    return True


def ids_of_a_file(folder: Path) -> None:
    """Detections of one image, whose number is another image's id, get the id that the file of annotations gives it."""
    base(folder)
    file = folder / "instances_default.json"  # with the classes of the scenes, which the model knows
    file.write_text(file.read_text().replace('"red"', '"rectangle"').replace('"blue"', '"ellipse"'))
    args = ("--annotations", file.name, "--threshold", "0", "--no-pictures", "--out", "out")
    command(folder, "-m", "detr_fabric.predict", "base/last.ckpt", "images/10.png", *args)
    found = {row["image_id"] for row in json.loads((folder / "out" / "predictions.json").read_text())}
    see(found == {2}, f"image_id {found} instead of 2")


CASES: dict[str, Callable[[Path], object]] = {
    "00_yolo_dots_in_file_names": lambda at: [len(part.boxes) for part in train(root=at)] == [8, 8],
    "01_exif_yolo": turned_boxes,
    "03_yolo_pose_as_polygon": lambda at: np.allclose(
        train(root=at)[0].boxes, first_values(at / "labels" / "train"), atol=1e-3
    ),
    "04_negative_area": lambda at: "area that is no number from 0" in refusal(lambda: coco(at)),
    "05_all_iscrowd": lambda at: "no object to train on, only 24 crowds" in refusal(lambda: coco(at)),
    "07_same_class_name": lambda at: len(set(names(coco(at)))) == len(coco(at).categories.ids),
    "08_voc_float_from_zero": lambda at: np.allclose(voc(at).boxes, corners(at / "Annotations")),
    "09_voc_filename_without_extension": lambda at: files(voc(at)) == [f"n0_{n}.jpg" for n in range(6)],
    "10_voc_stale_filename": lambda at: files(voc(at)) == [f"f{n}.png" for n in range(6)],
    "11_backslash_file_name": lambda at: all(
        (at / name).is_file() for name in files(read_annotations(at / "result.json"))
    ),
    "12_yolo_symlinked_folders": lambda at: [len(part) for part in train(root=at)] == [12, 12],
    "13_yolo_train_txt": lambda at: [len(part) for part in train(root=at)] == [6, 6],
    "13_yolo_train_txt_list_of_folders": lambda at: "batch_c` is no folder" in refusal(lambda: train(root=at)),
    "15_predictions_ids_of_numbered_files": ids_of_a_file,
    "16_predict_folder_skips_jfif": lambda at: [
        file.name for file in find_images([str(at / "photos")], at / "out")
    ] == ["chrome.jfif", "rgb.png"],
    "17_yaml_names_on_off": lambda at: names(train(root=at)[0]) == ["off", "on"],
    "18_roboflow_root_of_same_name": by_name,
    "19_same_file_name_twice": lambda at: "11 images with the file of another one" in said(coco(at)),
    "21_fractions": lambda at: "they may be fractions" in said(coco(at)),
    "22_voc_same_stem_in_folders": twice_by_two_ids,
}  # fmt: skip
