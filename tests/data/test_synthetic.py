"""The built-in scenes: the same for everyone, exact boxes, and never half a set on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fabric.boxes import iou_and_union
from detr_fabric.config import Config, DataConfig
from detr_fabric.data import synthetic
from detr_fabric.data.build import build_datasets
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.errors import UserError


def digest(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_scenes_read_back_with_the_boxes_they_were_drawn_with(tmp_path: Path) -> None:
    root = synthetic.prepare(48, 12, 3, str(tmp_path))
    for split, count in (("train2017", 12), ("val2017", 3)):
        found = read_annotations(root / "annotations" / f"instances_{split}.json")
        assert len(found) == count and found.dropped == 0
        assert found.categories.names == ("rectangle", "ellipse", "triangle")
        for index in range(count):
            image, kinds, boxes = synthetic.scene(split, index, 48)
            assert found.boxes[found.objects(index)].tolist() == boxes
            assert (found.labels[found.objects(index)] + 1).tolist() == kinds
            stored = Image.open(root / split / str(found.file_names[index]))
            assert np.abs(np.asarray(stored).astype(int) - np.asarray(image)).mean() < 3


def test_boxes_are_tight_around_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for kind in synthetic.CLASSES:
        for box in ((0, 0, 40, 60), (13, 22, 57, 71), (100, 131, 256, 256)):
            monkeypatch.setattr(synthetic, "FINE", 1)  # a mask at full resolution
            rows, columns = np.nonzero(np.asarray(synthetic._mask(rng, kind, box, 256)))
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box


def test_scenes_have_one_to_four_objects_of_moderate_size_that_hardly_overlap() -> None:
    counts, kinds = set(), set()
    for index in range(200):
        _, classes, boxes = synthetic.scene("train2017", index, 64)
        counts.add(len(boxes))
        kinds |= set(classes)
        xywh = torch.tensor(boxes)
        assert (xywh[:, 2:] >= 0.18 * 64).all() and (xywh[:, 2:] <= 0.5 * 64).all()
        xyxy = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        assert (xyxy >= 0).all() and (xyxy <= 64).all()
        overlap = iou_and_union(xyxy[:, None], xyxy[None])[0].fill_diagonal_(0)
        assert overlap.max() < 0.1
    assert counts == {1, 2, 3, 4}
    assert kinds == {1, 2, 3}


def test_a_scene_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few, many = (synthetic.prepare(32, count, 1, str(tmp_path)) for count in (3, 6))
    for name in ("000000000001.jpg", "000000000003.jpg"):
        assert (few / "train2017" / name).read_bytes() == (many / "train2017" / name).read_bytes()


def test_training_and_validation_scenes_differ() -> None:
    assert synthetic.scene("train2017", 0, 32)[2] != synthetic.scene("val2017", 0, 32)[2]


def test_scenes_are_pinned_so_that_a_change_raises_the_version() -> None:
    _, kinds, boxes = synthetic.scene("train2017", 1, 64)
    assert synthetic.VERSION == 1
    assert (kinds, boxes) == ([2, 2], [[27.75, 3.25, 27.0, 30.5], [16.25, 32.5, 16.75, 29.25]])


def test_a_complete_set_is_reused_and_the_cache_folder_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = synthetic.prepare(32, 2, 1)
    assert root == tmp_path / "detr_fabric" / "shapes" / "32-2-1-v1"
    before = root.stat().st_mtime_ns, [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))]
    assert synthetic.prepare(32, 2, 1) == root
    assert before == (root.stat().st_mtime_ns, [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))])


def test_writers_at_the_same_time_end_with_one_whole_set(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        roots = set(pool.map(lambda _: synthetic.prepare(32, 20, 2, str(tmp_path / "together")), range(4)))
    alone = synthetic.prepare(32, 20, 2, str(tmp_path / "alone"))
    assert len(roots) == 1
    assert digest(roots.pop()) == digest(alone)
    assert [path.name for path in (tmp_path / "together").iterdir()] == ["32-20-2-v1"]


@pytest.mark.process
@pytest.mark.faults
def test_a_kill_never_leaves_half_a_set(tmp_path: Path) -> None:
    code = f"from detr_fabric.data import synthetic; synthetic.prepare(32, 100000, 1, {str(tmp_path)!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(Path(synthetic.__file__).parents[2])}
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob(".32-*/train2017/*9.jpg")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left_over,) = tmp_path.iterdir()
    assert left_over.name.startswith(".32-100000-1-v1.")

    # The next writer of this set removes it, once it is old enough to be nobody's.
    synthetic._remove_stale(tmp_path, "32-100000-1-v1")
    assert left_over.exists()
    os.utime(left_over, (0, 0))
    synthetic._remove_stale(tmp_path, "32-100000-1-v1")
    assert not left_over.exists()


def test_a_folder_that_cannot_be_written_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data.shapes-dir"):
        synthetic.prepare(32, 1, 1, str(tmp_path / "file"))


def test_without_a_root_the_data_are_the_scenes(tmp_path: Path) -> None:
    data = DataConfig(shapes_dir=str(tmp_path), shapes_train=6, shapes_val=2, shapes_size=48)
    train, val = build_datasets(Config(data=data).resolve().data, seed=0)
    assert (len(train), len(val), train.categories.num_classes) == (6, 2, 3)
    image, target = val[(0, 1)]
    assert image.shape == (3, 48, 48)
    assert target.size == target.orig_size == (48, 48)
    content = json.loads((tmp_path / "48-6-2-v1" / "annotations" / "instances_val2017.json").read_text())
    assert len(target.labels) == sum(row["image_id"] == 2 for row in content["annotations"])
