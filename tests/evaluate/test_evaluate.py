"""Evaluating a checkpoint on other data than it was trained on, and what is said about its mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detr_fabric.config import Config, DataConfig, EvalConfig, ModelConfig
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.formats.other_classes import match_by_name
from detr_fabric.errors import UserError
from detr_fabric.evaluate import __main__ as evaluate
from detr_fabric.evaluate import report
from detr_fabric.evaluate.coco import STATS
from detr_fabric.evaluate.detect import Evaluation
from detr_fabric.evaluate.settings import Settings, data_defaults
from detr_fabric.model.build import build_model
from detr_fabric.runtime.checkpoint import save_checkpoint
from tests.coco_files import coco, image, thing, write_images, write_json, write_root
from tests.commands import exit_code
from tests.patching import Patch

PETS = Categories((1, 2), ("cat", "dog"))
CENTRE = (10, 7.5, 20, 15)  # the middle of an image of 40 x 30 pixels, half as wide and high


def write_checkpoint(path: Path, data: DataConfig) -> str:
    """A model with one query, which sees a dog in the middle of every image with a score of 0.9."""
    model = ModelConfig(
        backbone="resnet18", last_stage="layer1", backbone_weights="none", hidden_dim=16, heads=2,
        enc_layers=1, dec_layers=1, dim_feedforward=16, num_queries=1,
    )  # fmt: skip
    config = Config(data=data, model=model).resolve()
    detr = build_model(config.model, config.attn, PETS.num_classes)
    with torch.no_grad():
        for layer, bias in (
            (detr.class_embed, torch.tensor([0.01, 0.9, 0.09]).log()),
            (detr.bbox_embed.layers[2], torch.tensor([0.5, 0.5, 0.5, 0.5]).logit()),
        ):
            layer.weight.zero_()
            layer.bias.copy_(bias)
    content = {"model": detr.state_dict(), "config": config.to_dict(), "categories": PETS.to_dict()}
    save_checkpoint(path, {**content, "state": {"step": 1}})
    return str(path)


@pytest.fixture
def trained(tmp_path: Path) -> str:
    """A checkpoint, trained on data with two dogs in the middle and a cat elsewhere."""
    content = coco(annotations=[thing(1, 1, CENTRE, 2), thing(2, 2, CENTRE, 2), thing(3, 2, (0, 0, 5, 5), 1)])
    root = write_root(tmp_path / "trained", content, content)
    data = DataConfig(root=str(root), scales=(32,), max_size=64, workers=0)
    return write_checkpoint(tmp_path / "run" / "best.ckpt", data)


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The exit code of the command."""
    return exit_code(monkeypatch, evaluate.main, *args, "--accelerator", "cpu")


def scores(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# Other data


def other_data(tmp_path: Path, **tables: Any) -> list[str]:
    content = coco(**tables)
    images = write_images(tmp_path / "other", content)
    return ["--data.val-images", str(images), "--data.val-annotations", str(write_json(tmp_path / "o.json", content))]


def test_data_with_other_ids_and_classes_is_matched_by_name(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, trained, "--out", tmp_path / "own.json") == 0
    own = scores(tmp_path / "own.json")
    assert own["AP_class"] == {"dog": pytest.approx(1), "cat": 0}
    assert "matched by name" not in capsys.readouterr().out

    categories = [{"id": 1, "name": "Dog"}, {"id": 2, "name": "sheep"}, {"id": 30, "name": "cat"}]
    annotations = [
        thing(5, 1, CENTRE, 1),
        thing(6, 2, CENTRE, 1),
        thing(7, 2, (0, 0, 5, 5), 30),
        thing(8, 1, CENTRE, 2),
    ]
    args = other_data(tmp_path, annotations=annotations, categories=categories)
    assert run(monkeypatch, trained, *args, "--out", tmp_path / "a" / "other.json") == 0
    other = scores(tmp_path / "a" / "other.json")
    assert {name: other[name] for name in STATS} == {name: own[name] for name in STATS}
    assert other["AP_class"] == own["AP_class"]
    said = capsys.readouterr().out
    assert "ignored (unknown to the model): sheep (1 of 4 objects)" in said


def test_a_class_with_another_name_is_found_by_its_alias(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, trained, "--out", tmp_path / "own.json") == 0
    args = other_data(tmp_path, categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "Guide_dog"}])
    aliases = ["--data.aliases", "guide dog=dog", "kitten=cat"]
    assert run(monkeypatch, trained, *args, *aliases, "--out", tmp_path / "other.json") == 0
    assert set(scores(tmp_path / "other.json")["AP_class"]) == {"cat", "dog"}
    assert "unknown to the model" not in capsys.readouterr().out
    assert run(monkeypatch, trained, *args, "--data.aliases", "dog") == 2
    assert "data.aliases has 'dog': give NAME=MODEL'S" in capsys.readouterr().err


def test_an_alias_goes_before_a_class_of_the_same_name(tmp_path: Path) -> None:
    file = write_json(tmp_path / "a.json", coco())
    found = match_by_name(file, Categories((7, 8, 9), ("cat", "dog", "lynx")), aliases=("cat=lynx",))
    assert found.labels == {1, 2} and found.annotations.labels.tolist() == [2, 2, 1]


def test_a_file_by_name_is_the_same_as_by_id(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [image(number) for number in range(1, 9)]
    objects = [
        thing(k, int(rng.integers(1, 9)), (float(k), 1, 5, 5), int(rng.integers(1, 4)), iscrowd=int(rng.random() < 0.2))
        for k in range(1, 30)
    ]
    names = {1: "cat", 2: "dog", 3: "sheep"}
    table = [{"id": id, "name": name} for id, name in names.items()]
    clean = read_annotations(write_json(tmp_path / "a.json", coco(images, objects, table)))

    swapped = {1: 30, 2: 1, 3: 2}
    moved = [thing | {"category_id": swapped[thing["category_id"]]} for thing in objects]
    table = [{"id": swapped[id], "name": name.upper() + "_"} for id, name in names.items()]
    found = match_by_name(write_json(tmp_path / "b.json", coco(images, moved, table)), clean.categories)
    assert found.labels == {0, 1, 2} and len(found.notes) == 1
    for field in ("image_ids", "file_names", "sizes", "offsets", "boxes", "labels", "crowd", "areas"):
        np.testing.assert_array_equal(getattr(found.annotations, field), getattr(clean, field))

    few = Categories((7, 8), ("sheep", "cow"))
    some = match_by_name(tmp_path / "a.json", few)
    assert some.labels == {0} and some.annotations.categories is few and len(some.annotations) == 8
    for number in range(8):
        expected = clean.boxes[clean.objects(number)][clean.labels[clean.objects(number)] == 2]
        np.testing.assert_array_equal(some.annotations.boxes[some.annotations.objects(number)], expected)
    assert (some.annotations.labels == 0).all()


def test_pascal_voc_data_is_matched_by_name_too(tmp_path: Path) -> None:
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{k}</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>"
        for k, name in ((3, "sheep"), (5, "Dog"))
    )
    size = "<size><width>40</width><height>30</height></size>"
    file = tmp_path / "1.xml"
    file.write_text(f"<annotation><filename>1.png</filename>{size}{objects}</annotation>")
    found = match_by_name(tmp_path, PETS)
    assert found.labels == {1} and found.annotations.labels.tolist() == [1]
    assert found.annotations.boxes[0, 2:].tolist() == [26, 19] and "sheep (1 of 2 objects)" in found.notes[1]


def test_a_name_that_says_too_little_is_an_error(tmp_path: Path) -> None:
    file = write_json(tmp_path / "a.json", coco())
    with pytest.raises(UserError, match=r"knows none of its classes \(cat, dog\): use data with cow"):
        match_by_name(file, Categories((1,), ("cow",)))
    with pytest.raises(UserError, match="2 classes named 'cat'"):
        match_by_name(file, Categories((3, 4, 5), ("cat", "cat", "dog")))
    by_id = match_by_name(file, Categories((1, 2, 3), ("cat", "dog", "cat")))
    assert by_id.annotations.labels.tolist() == [0, 0, 1]


def test_data_that_is_named_is_not_hidden_by_that_of_training() -> None:
    paths = dict(train_images="a", train_annotations="b", val_images="c", val_annotations="d")
    trained = DataConfig(**paths, scales=(7 * 16,))
    assert data_defaults(trained, DataConfig(root="x")) == DataConfig(root="", scales=(7 * 16,))
    assert data_defaults(trained, DataConfig()) == trained
    parts = DataConfig(train_images="a", train_annotations="b", val_fraction=0.2)
    overfit = DataConfig(root="c", validate_on_train=True)
    for each, root in ((parts, ""), (overfit, "c"), (DataConfig(), "")):
        given = DataConfig(train_images="t", train_annotations="t", val_images="x", val_annotations="y")
        data = data_defaults(each, given)
        assert (data.root, data.val_fraction, data.validate_on_train, data.builtin) == (root, None, False, False)


def test_confusion_and_worst_images_come_with_the_scores(
    trained: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    patch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    captions: list[list[str]] = []
    paint = report.grid
    patch(report, "grid", lambda p, c, **size: captions.append(c) or paint(p, c, **size))
    images = [image(number) for number in range(1, 5)]
    annotations = [
        thing(1, 1, CENTRE, 1),  # a cat, taken for a dog
        thing(2, 2, CENTRE, 2),  # right
        thing(3, 3, (0, 0, 5, 5), 1),  # missed, and a dog where there is none
        thing(4, 3, (30, 0, 5, 5), 1),
        thing(5, 4, (0, 0, 40, 30), 2, iscrowd=1),  # the dog lies in a crowd
    ]
    args = other_data(tmp_path, images=images, annotations=annotations)
    assert run(monkeypatch, trained, *args, "--confusion", "0.5", "--worst", "3", "--out", tmp_path / "s.json") == 0
    written = scores(tmp_path / "s.json")["confusion"]
    assert written["classes"] == ["cat", "dog", "background"]
    assert written["true_by_found"] == [[0, 1, 2], [0, 1, 0], [0, 1, 0]]
    assert captions == [
        [
            "3: F1 0.00, 2 of 2 missed, 1 false",
            "1: F1 0.00, 1 of 1 missed, 1 false",
            "2: F1 1.00, 0 of 1 missed, 0 false",
        ]
    ]
    figures = scores(tmp_path / "s.json")
    dog = {"f1": 0.5, "threshold": pytest.approx(0.9), "precision": pytest.approx(1 / 3), "recall": 1, "objects": 1}
    assert figures["F1_class"]["dog"] == dog and figures["F1_class"]["cat"]["f1"] == 0
    assert (
        figures["duplicates"]["detections"] == 3 and figures["calibration"]["bins"][8]["detections"] == 3
    )  # below 0.9
    errors = {kind: number for kind, number in figures["tide"]["counts"].items() if number}
    assert errors == {"classification": 1, "background": 1, "missed": 2}
    assert (tmp_path / "worst.png").stat().st_size > 0
    said = capsys.readouterr().out
    assert "cat" in said and "nothing there" in said and "3 images of lowest F1" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["dog", "0.500", "0.500", "0.900", "0.333", "1.000", "1"] in rows
    args += ["--eval.backend", "pycocotools"]
    assert run(monkeypatch, trained, *args, "--confusion", "0.95", "--worst", "9") == 0
    assert captions[1][1:3] == ["1: F1 0.00, 1 of 1 missed, 0 false", "2: F1 0.00, 1 of 1 missed, 0 false"]
    assert (tmp_path / "run" / "worst.png").stat().st_size > 0


def test_images_that_cannot_be_read_are_named_and_not_drawn(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = other_data(tmp_path, annotations=[thing(1, 1, CENTRE, 2), thing(2, 2, CENTRE, 2)])
    (tmp_path / "other" / "1.png").write_text("broken")
    args += ["--data.bad-images", "skip", "--confusion", "0.5", "--worst", "2", "--out", str(tmp_path / "s.json")]
    assert run(monkeypatch, trained, *args) == 0
    said = capsys.readouterr().out
    assert "1.png is no JPEG" in said and "the 1 images of lowest F1" in said
    assert scores(tmp_path / "s.json")["confusion"]["true_by_found"] == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_classes_that_the_data_does_not_annotate_are_no_mistakes(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = other_data(tmp_path, annotations=[thing(1, 1, CENTRE, 9)], categories=[{"id": 9, "name": "cat"}])
    assert run(monkeypatch, trained, *args, "--confusion", "0.5", "--out", tmp_path / "s.json") == 0
    assert scores(tmp_path / "s.json")["confusion"]["true_by_found"] == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


# Padding


def test_the_padding_check_evaluates_with_and_without_padding(
    trained: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    patch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    masks = []

    def fake(fabric: Any, model: Any, loader: Any, backend: str, watch: Any, topk: int) -> Evaluation:
        padded = [batch.mask.any().item() for batch, _ in loader]
        masks.append(padded)
        stats = {name: 0.5 for name in STATS} | {"APs": -1.0}
        return Evaluation(stats | ({"AP75": 0.4875} if any(padded) else {}), {}, [], [], 1.0, 0.5)

    patch(report, "evaluate", fake)
    args = other_data(tmp_path, images=[image(1), image(2, width=30, height=40), image(3)])
    more = ("--eval.batch-size", "2", "--padding-check", "--data.pad-multiple", "7", "--out", tmp_path / "s.json")
    assert run(monkeypatch, trained, *args, *more) == 0
    assert masks == [[True, True], [False] * 3]
    said = capsys.readouterr().out
    assert "  APs          –        –  –\n" in said
    assert "AP75    0.5000   0.4875  -0.0125" in said and "padding changes AP75 most, by -0.0125" in said
    assert scores(tmp_path / "s.json")["padding_check"]["largest_difference"] == pytest.approx(0.0125)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(padding_check=True), "--eval.batch-size"),
        (dict(confusion=50.0), "--confusion 50.0"),
        (dict(worst=-1), "--worst -1"),
    ],
)
def test_settings_without_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Settings("best.ckpt", eval=EvalConfig(batch_size=1), **changes)


@pytest.mark.process
def test_help_comes_without_torch_with_and_without_a_checkpoint() -> None:
    code = (
        "import sys\nfrom detr_fabric.evaluate.__main__ import main\n"
        "for args in (['--help'], ['some.ckpt', '--help']):\n"
        "    sys.argv = ['evaluate', *args]\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        print('code', end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("--confusion") >= 2 and done.stdout.count("code 0 False\n") == 2, done.stderr
