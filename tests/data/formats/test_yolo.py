"""YOLO folders: the same data as the COCO file that they were made from, or one clear sentence."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detr_fabric.config import Config, DataConfig
from detr_fabric.data.build import build_datasets
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.errors import UserError
from tests.checking import checked
from tests.coco_files import coco, image, write_images
from tests.format_files import small, write_yolo


def test_polygons_and_numbered_names_are_read(tmp_path: Path) -> None:
    content = coco([image(1)], [])
    write_images(tmp_path / "images", content)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("1 0.25 0.5 0.5 0.1 0.75 0.5\n\n0 0.5 0.5 1 1.0005")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: ./images\nnames:\n  0: cat\n  1: dog\n")
    found = read_annotations(tmp_path / "data.yaml", images=tmp_path / "images")
    np.testing.assert_allclose(found.boxes, [[10, 3, 20, 12], [0, -0.0075, 40, 30.015]], atol=1e-9)
    assert [found.categories.name(label) for label in found.labels] == ["dog", "cat"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"labels/1.txt": "0 0.5 0.5 0.1"}, "1.txt line 1 has 4 fields"),
        ({"labels/1.txt": "0 0.5 0.5 0.1 0.1 0.9"}, "1.txt line 1 has 6 fields"),
        ({"labels/1.txt": "\n0 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1 0.1"}, "1.txt line 3: class 2 is not among the 2 names"),
        ({"labels/1.txt": "-1 0.5 0.5 0.1 0.1"}, "class -1"),
        ({"labels/1.txt": "cat 0.5 0.5 0.1 0.1"}, "1.txt line 1 is no class number and fractions"),
        ({"labels/1.txt": "0 20 15 10 10"}, "1.txt line 1: a box has fractions"),
        ({"labels/1.txt": "0 nan 0.5 0.1 0.1"}, "1.txt line 1: a box has fractions"),
        ({"labels/1.txt": "\xff\xfe\x00"}, None),
        ({"labels/9.txt": "0 0.5 0.5 0.1 0.1"}, "9.txt has no image of its name"),
        ({"data.yaml": "names: [cat"}, "data.yaml is broken YAML at line"),
        ({"data.yaml": "names: {1: cat}"}, "`names` is no list of class names"),
        ({"data.yaml": "names: []"}, "`names` is no list of class names"),
        ({"data.yaml": "names: !!python/object/apply:os.system ['true']"}, "data.yaml is broken YAML"),
        ({"data.yaml": "- cat"}, "data.yaml is no data.yaml of YOLO"),
        ({"images/1.jpg": "x"}, "image ids are used more than once"),
    ],
)
def test_a_broken_yolo_file_is_one_sentence(files: dict[str, str], words: str | None, tmp_path: Path) -> None:
    write_images(tmp_path / "images", coco([image(1)], []))
    write_yolo(tmp_path, coco([image(1)], []))
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words or "cannot be read") as caught:
        read_annotations(tmp_path / "data.yaml", images=tmp_path / "images")
    assert "\n" not in str(caught.value)


def test_data_yaml_is_a_root_to_train_on_and_to_check(tmp_path: Path) -> None:
    """As exports have it: train/images beside data.yaml, which calls it ../train/images."""
    content = small()
    for part in ("train", "valid"):
        write_images(tmp_path / part / "images", content)
        write_yolo(tmp_path / part, content)
        (tmp_path / part / "data.yaml").unlink()
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cat, dog]\n")
    for root in ("data.yaml", "."):
        data = replace(Config(), data=DataConfig(root=str(tmp_path / root))).resolve().data
        train, val = build_datasets(data, seed=0)
        assert (len(train), len(val), train.folder) == (4, 4, tmp_path.resolve() / "train" / "images")
        assert train.load(0)[1].tolist() == [[10, 5, 30, 15], [0, 0, 40, 30]]
    code, out, _ = checked("--root", tmp_path / "data.yaml", "--workers", "1")
    assert code == 0 and out.count("training accepts it") == 2, out
    (tmp_path / "valid" / "images" / "2.png").write_bytes(b"\x89PNG")
    code, out, _ = checked("--root", tmp_path, "--workers", "1")
    assert code == 1 and "2.png" in out
    mend = re.search(r"to write a copy that it accepts: python -m detr_fabric.check (.*)", out)
    assert mend is not None
    code, out, _ = checked(*(shlex.split(mend[1].replace("OUT.json", str(tmp_path / "val.json")))), "--workers", "1")
    assert code == 0 and len(read_annotations(tmp_path / "val.json")) == 3, out
