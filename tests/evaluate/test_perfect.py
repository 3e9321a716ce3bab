"""Perfect detections score 1 on every data set that is accepted, whatever its format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import Annotations, read_annotations
from detr_fabric.data.ground_truth import ground_truth
from detr_fabric.data.transforms import EvalTransform
from detr_fabric.errors import UserError
from detr_fabric.evaluate.coco import Detections, score
from tests.coco_files import coco, image, thing, write_images, write_json

SIDES = st.floats(0.25, 30) | st.integers(1, 60)
EDGES = st.floats(-10, 50) | st.integers(-10, 50)
FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("perfect") / "images", coco([image(n) for n in range(3)], []))


def check_perfect(images: Path, annotations: Annotations) -> None:
    """Detects exactly what training is given as targets."""
    data = CocoDetection(images, annotations, EvalTransform(30, 40), 0)
    found = []
    for index, image_id in enumerate(data.image_ids):
        _, boxes, labels = data.load(index)
        found.append(Detections(image_id, torch.ones(len(boxes)), labels, boxes))
    for backend in ("hotcoco", "pycocotools"):
        scores = score(ground_truth(annotations), data.image_ids, found, backend)
        assert scores.stats["AP"] == pytest.approx(1, abs=1e-6)
        assert list(scores.per_class.values()) == pytest.approx([1] * len(scores.per_class), abs=1e-6)


def accepted(path: Path, images: Path) -> Annotations | None:
    try:
        return read_annotations(path, images=images).require_objects(path)
    except UserError as error:
        assert "\n" not in str(error)
        return None


AREAS = st.none() | st.floats(-100, 1000) | st.sampled_from([0, 2e10, 1e30])
CATEGORIES = [{"id": id, "name": name} for id, name in ((0, "cat"), (1, "cat"), (5, "dog"), (7, "dog"), (9, "cow"))]


@st.composite
def objects(draw: st.DrawFn) -> list[dict[str, Any]]:
    rows = []
    for number in range(draw(st.integers(1, 8))):
        box = [draw(EDGES), draw(EDGES), draw(SIDES), draw(SIDES)]
        row = thing(number, draw(st.integers(0, 2)), box, draw(st.sampled_from([0, 1, 5, 7])))
        row |= {"iscrowd": draw(st.sampled_from([0, 0, 0, 1]))}
        if (area := draw(st.none() | AREAS)) is not None:
            row["area"] = area
        if draw(st.integers(0, 3)) == 0:
            x, y, w, h = row.pop("bbox")
            row["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
        rows.append(row)
    return rows


@FEW
@given(objects(), st.booleans())
def test_on_coco(images: Path, rows: list[dict[str, Any]], sizes: bool) -> None:
    entries = [image(n) if sizes else {"id": n, "file_name": f"{n}.png"} for n in range(3)]
    path = write_json(images.parent / "a.json", coco(entries, rows, CATEGORIES))
    annotations = accepted(path, images)
    wrong = [row for row in rows if not 0 <= row.get("area", 0) <= 1e10]
    assert annotations is None or not wrong
    if annotations is not None:
        check_perfect(images, annotations)


VOC_OBJECTS = st.tuples(st.integers(0, 2), EDGES, EDGES, SIDES, SIDES, st.sampled_from(["", "0", "1"]))


@pytest.mark.process
@FEW
@given(st.lists(VOC_OBJECTS, min_size=1, max_size=8))
def test_on_voc(images: Path, rows: list[tuple[Any, ...]]) -> None:
    folder = images.parent / "Annotations"
    folder.mkdir(exist_ok=True)
    for number in range(3):
        body = "".join(
            f"<object><name>class {n % 2}</name><difficult>{difficult}</difficult>"
            f"<bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for n, (image, x, y, w, h, difficult) in enumerate(rows)
            if image == number
        )
        (folder / f"{number}.xml").write_text(f"<annotation><filename>0.png</filename>{body}</annotation>")
    if (annotations := accepted(folder, images)) is not None:
        assert annotations.file_names.tolist() == ["0.png", "1.png", "2.png"]
        check_perfect(images, annotations)


CORNERS = st.tuples(*[st.floats(0, 0.48) | st.just(0.0)] * 2, *[st.floats(0.52, 1) | st.just(1.0)] * 2)
POINTS = st.lists(st.floats(0, 1), max_size=4)  # may make a box a pose or a polygon


@pytest.mark.process
@FEW
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["0", "1", "1.0"]), CORNERS, POINTS), min_size=1, max_size=6),
    st.sampled_from(["", "kpt_shape: [1, 2]", "kpt_shape: [2, 2]", "task: segment"]),
    st.booleans(),
)
def test_on_yolo(images: Path, rows: list[tuple[Any, ...]], yaml: str, boxes: bool) -> None:
    labels = images.parent / "labels"
    labels.mkdir(exist_ok=True)
    for number in range(3):
        lines = [
            " ".join(map(str, [label, (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, *([] if boxes else points)]))
            for image, label, (x0, y0, x1, y1), points in rows
            if image == number
        ]
        (labels / f"{number}.txt").write_text("\n".join(lines))
    (images.parent / "data.yaml").write_text(f"train: images\nnames: [cat, cat]\n{yaml}\n")
    annotations = accepted(images.parent / "data.yaml", images)
    if annotations is not None:
        check_perfect(images, annotations)
