"""Prediction: what evaluation sees, on any files, from the command line and from Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import coco, image, write_json
from lightning_fabric import Fabric
from PIL import Image

from detr_fabric import load, predict, prediction
from detr_fabric.analysis.capture import capture, plain
from detr_fabric.batch import normalize, pad_images
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.checkpoint import save_checkpoint
from detr_fabric.config import Config, DataConfig, ModelConfig
from detr_fabric.data.annotations import Annotations, read_annotations
from detr_fabric.data.categories import Categories
from detr_fabric.data.coco import CocoDetection
from detr_fabric.data.images import to_tensor
from detr_fabric.data.loader import EvalLoader
from detr_fabric.data.paths import ImageFile, find_images, image_ids
from detr_fabric.data.transforms import EvalTransform, resize
from detr_fabric.detector import Found
from detr_fabric.errors import UserError
from detr_fabric.evaluation import detect
from detr_fabric.model.detr import build_model
from detr_fabric.pictures import Boxes, Picture, class_color, draw

PETS = Categories((7, 42), ("cat", "großer Hund"))


def write_checkpoint(path: Path, categories: Categories = PETS) -> str:
    """A small DETR with random weights, which sees images with a shorter side of 64 pixels."""
    model = ModelConfig(
        backbone="resnet18", last_stage="layer2", backbone_weights="none", hidden_dim=32, heads=4,
        enc_layers=1, dec_layers=2, dim_feedforward=64, num_queries=7,
    )  # fmt: skip
    config = Config(data=DataConfig(root="none", scales=(64,), max_size=100), model=model).resolve()
    torch.manual_seed(0)
    weights = build_model(config.model, config.attn, categories.num_classes).state_dict()
    weights["query_embed.weight"] *= 3  # queries that differ
    content = {"model": weights, "config": config.to_dict(), "categories": categories.to_dict(), "state": {"step": 1}}
    save_checkpoint(path, content)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.ckpt")


def write_image(path: Path, width: int = 90, height: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (height // 6, width // 6, 3), np.uint8)
    Image.fromarray(noise).resize((width, height)).save(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, args)])
    try:
        predict.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def results(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "predictions.json").read_text())


# Equal to evaluation


def test_boxes_are_what_evaluation_sees(coco_mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = read_annotations(coco_mini / "annotations" / "instances_val2017.json").first(12, with_objects=False)
    compare_with_evaluation(coco_mini / "val2017", annotations, 0.02, tmp_path, monkeypatch)


def test_boxes_of_odd_sizes_and_ids_are_what_evaluation_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(31, 47), (64, 64), (200, 33), (90, 60), (33, 200), (128, 96)] * 2
    images = [image(k, width=w, height=h, file_name=f"{k:04}.png") for k, (w, h) in enumerate(sizes, 3)]
    for entry in images:
        write_image(tmp_path / "images" / entry["file_name"], entry["width"], entry["height"])
    content = coco(images, [], [{"id": 9, "name": "cat"}, {"id": 70, "name": "dog"}])
    annotations = read_annotations(write_json(tmp_path / "a.json", content))
    compare_with_evaluation(tmp_path / "images", annotations, 0.2, tmp_path, monkeypatch)  # strips have much padding


def compare_with_evaluation(
    folder: Path, annotations: Annotations, padding: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 images under a random model, by prediction and by evaluation; padding: how far it may move scores."""
    file = write_checkpoint(tmp_path / "last.ckpt", annotations.categories)
    dataset = CocoDetection(folder, annotations, EvalTransform(64, 100), 0)
    loader = EvalLoader(dataset, 1, rank=0, world=1, workers=0, pad_multiple=1, pin_memory=False)
    detector = load(file, "cpu")
    expected = []
    for found in detect(Fabric(accelerator="cpu", devices=1), detector.model, loader):
        for query in found.scores.argsort(descending=True, stable=True).tolist():
            left, top, right, bottom = found.boxes[query]
            box = [x.item() for x in (left, top, right - left, bottom - top)]
            category = annotations.categories.id(int(found.labels[query]))
            expected.append((found.image_id, category, found.scores[query].item(), box))
    paths = [folder / name for name in annotations.file_names.tolist()]
    for batch_size in (1, 5):
        out = tmp_path / str(batch_size)
        args = (file, *paths, "--threshold", "0", "--out", out, "--no-pictures", "--accelerator", "cpu")
        assert run(monkeypatch, *args, "--batch-size", batch_size) == 0
        assert len(results(out)) == len(expected) == 12 * 7 and not (out / "pictures").exists()
    rows = results(tmp_path / "1")
    assert [(row["image_id"], row["category_id"]) for row in rows] == [row[:2] for row in expected]
    np.testing.assert_allclose([row["score"] for row in rows], [row[2] for row in expected], atol=1e-5)
    np.testing.assert_allclose([row["bbox"] for row in rows], [row[3] for row in expected], atol=1e-2)
    # In larger batches images have padding beside them, which moves scores, though not by much.
    rows = results(tmp_path / "5")
    for image_id in dataset.image_ids:
        ours = sorted(row["score"] for row in rows if row["image_id"] == image_id)
        theirs = sorted(score for image, _, score, _ in expected if image == image_id)
        np.testing.assert_allclose(ours, theirs, atol=padding)


def test_images_are_batched_by_shape_so_that_these_batches_change_nothing(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (width, height) in enumerate(((90, 60), (60, 90), (120, 80), (80, 120), (150, 100))):
        write_image(
            tmp_path / "in" / f"image{number}{'x' * number}.png", width, height
        )  # 96 x 64 or 64 x 96 when resized
    for size in (1, 3):
        args = (checkpoint, tmp_path / "in", "--threshold", "0", "--out", tmp_path / str(size), "--accelerator", "cpu")
        assert run(monkeypatch, *args, "--batch-size", size, "--no-pictures") == 0
    alone, together = results(tmp_path / "1"), results(tmp_path / "3")
    assert [row["image_id"] for row in alone] == [row["image_id"] for row in together]
    for key, error in (("score", 1e-5), ("bbox", 1e-2)):
        np.testing.assert_allclose([row[key] for row in together], [row[key] for row in alone], atol=error)


# Which files


def test_files_are_named_by_their_folder_and_numbers_only_where_all_are_numbers(tmp_path: Path) -> None:
    for name in (
        "a/1.jpg",
        "a/b/02.PNG",
        "a/.hidden.jpg",
        "a/.git/3.jpg",
        "a/notes.txt",
        "out/pictures/1.jpg",
        "c/1.jpg",
        "text/notes.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def found(*paths: str) -> list[str]:
        return [name for _, name in find_images([str(tmp_path / path) for path in paths], tmp_path / "out")]

    assert found("a") == ["1.jpg", "b/02.PNG"]
    assert found("a/1.jpg", "a") == ["1.jpg", "b/02.PNG"]  # each once
    assert found("a/*", "a/**/0*") == ["1.jpg", "02.PNG"]
    assert found("") == ["a/1.jpg", "a/b/02.PNG", "c/1.jpg"]
    assert found("a", "c") == ["a/1.jpg", "a/b/02.PNG", "c/1.jpg"]  # two are called 1.jpg
    assert found("out/pictures/1.jpg", "a/notes.txt") == ["1.jpg", "notes.txt"]  # what is named counts
    for nothing in ("no.jpg", "x*.jpg", "text", "a/*.txt"):
        with pytest.raises(UserError, match="no image|no such file"):
            found(nothing)
    assert image_ids([ImageFile(Path(), "000000000139.jpg"), ImageFile(Path(), "a/7.png")]) == [139, 7]
    for names in (("1.jpg", "x.jpg"), ("1.jpg", "01.jpg"), ("1.jpg", "²3.jpg")):
        assert image_ids([ImageFile(Path(), name) for name in names]) == list(names)


def test_broken_files_are_named_and_skipped(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_image(tmp_path / "in" / "good.jpg")
    (tmp_path / "in" / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "in" / "cut.jpg").write_bytes(good.read_bytes()[:300])
    (tmp_path / "in" / "empty.png").touch()
    write_image(tmp_path / "in" / "other.webp")
    for size in (1, 3):
        assert (
            run(
                monkeypatch,
                checkpoint,
                tmp_path / "in",
                "--out",
                tmp_path / "out",
                "--batch-size",
                size,
                "--threshold",
                "0",
            )
            == 0
        )
        said = capsys.readouterr()
        assert {row["image_id"] for row in results(tmp_path / "out")} == {"good.jpg", "other.webp"}
        left_out = [line for line in said.err.splitlines() if line.startswith("left out: ")]
        assert [any(name in line for line in left_out) for name in ("page.jpg", "cut.jpg", "empty.png")] == [True] * 3
        assert "3 of 5 files were left out" in said.err and "in 2 images" in said.out
    assert run(monkeypatch, checkpoint, tmp_path / "in" / "page.jpg", "--out", tmp_path / "none") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: none of 1 files could be read")


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["{checkpoint}"], "name a checkpoint and images"),
        (["nothing.ckpt", "{image}"], "nothing.ckpt: no such file"),
        (["{checkpoint}", "nothing.jpg"], "nothing.jpg: no such file or folder"),
        (["{checkpoint}", "{image}", "--out", "/dev/null/x"], "--out /dev/null/x: .*choose another folder"),
    ],
)
def test_mistakes_end_in_one_sentence(
    args: list[str],
    sentence: str,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    image = write_image(tmp_path / "image.png")
    assert run(monkeypatch, *(arg.format(checkpoint=checkpoint, image=image) for arg in args)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{sentence}", line), line


def test_a_threshold_that_is_no_score_is_refused(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, checkpoint, "any.jpg", "--threshold", "70") == 2
    assert "--threshold 70" in capsys.readouterr().err


def test_a_picture_never_replaces_a_file_it_is_made_from(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = write_image(tmp_path / "pictures" / "a.png")
    before = image.read_bytes()
    assert run(monkeypatch, checkpoint, image, "--out", tmp_path) == 2
    assert "would be overwritten" in capsys.readouterr().err and image.read_bytes() == before


def test_a_photograph_that_asks_to_be_turned_is_said(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60)).save(tmp_path / "phone.jpg", exif=exif)
    assert run(monkeypatch, checkpoint, tmp_path / "phone.jpg", "--out", tmp_path / "out") == 0
    assert "1 of them have an orientation tag" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "pictures" / "phone.jpg").size == (540, 360)


# Pictures


def test_pictures_and_attention_are_drawn_for_each_image_and_detection(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "in" / "small.png", 90, 60)
    write_image(tmp_path / "in" / "deep" / "large.jpg", 900, 1600)
    looks = []
    draw_sheet = prediction.detection_sheet
    monkeypatch.setattr(
        prediction, "detection_sheet", lambda look, *rest: looks.append((look, *rest)) or draw_sheet(look, *rest)
    )
    args = (checkpoint, tmp_path / "in", "--out", tmp_path / "out", "--accelerator", "cpu")
    assert run(monkeypatch, *args, "--threshold", "0", "--attention", "--batch-size", "2") == 0
    folder = tmp_path / "out"
    assert Image.open(folder / "pictures" / "deep" / "large.jpg").size == (900, 1600)
    assert Image.open(folder / "pictures" / "small.png").size == (540, 360)  # enlarged, so that text can be read
    detector = load(checkpoint, "cpu")
    assert len(looks) == 2
    for look, queries, name in looks:
        found = detector(tmp_path / "in" / name, threshold=0)
        assert sorted(queries) == list(range(7)) == sorted(found.queries.tolist())
        with capture(detector.model) as seen, torch.no_grad():
            image = detector.prepare(prediction.read_image(tmp_path / "in" / name)).image
            plain(detector.model)(*normalize(pad_images([image])))
        for layer, weights in enumerate(look.cross):  # (H, Q, h, w)
            expected = seen.weights["decoder_cross"][layer][0].unflatten(-1, seen.mask.shape[-2:])
            torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
        sheet = Image.open(folder / "attention" / f"{name}.png")
        assert sheet.height > 7 * sheet.width / 12  # seven rows of six tiles and their names
    shutil.rmtree(folder)
    assert run(monkeypatch, *args, "--threshold", "1", "--attention") == 0
    assert results(folder) == [] and not (folder / "attention").exists()


def test_files_whose_names_are_no_text_are_predicted_and_drawn(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsdecode(b"caf\xe9 \xff.png")
    write_image(tmp_path / "a.png").rename(tmp_path / name)
    args = (checkpoint, tmp_path / name, "--out", tmp_path / "out", "--threshold", "0", "--attention")
    assert run(monkeypatch, *args) == 0
    assert {row["image_id"] for row in results(tmp_path / "out")} == {name}
    assert (tmp_path / "out" / "attention" / f"{name}.png").exists()


def test_several_processes_are_refused(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(key, value)
    assert run(monkeypatch, checkpoint, write_image(tmp_path / "a.png"), "--out", tmp_path / "out") == 2
    assert "one process, not in 2" in capsys.readouterr().err


def test_text_fits_on_a_strip_and_labels_make_room_for_each_other() -> None:
    boxes = Boxes(torch.tensor([[100.0, 10, 400, 50]]), torch.tensor([0]), torch.tensor([0.9]))
    strip = np.asarray(draw(Picture(torch.full((3, 60, 4000), 90, dtype=torch.uint8), "", boxes), ["person"]))
    assert (strip[10:51, 100:401] == 90).all(-1).mean() > 0.1, "the box's inside is to be seen"
    many = Boxes(torch.tensor([[200.0, 200, 300, 300]] * 3), torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.8, 0.7]))
    picture = draw(Picture(torch.zeros(3, 512, 512, dtype=torch.uint8), "", many), ["a", "b", "c"])
    areas = [(np.asarray(picture) == class_color(label)).all(-1).sum() for label in range(3)]
    assert min(areas) > 300, areas


# From Python


def test_three_lines_of_python_find_the_same_in_files_images_tensors_and_arrays(
    checkpoint: str, tmp_path: Path
) -> None:
    photo = str(write_image(tmp_path / "photo.png", 120, 70))
    detr = load(checkpoint)
    found = detr(photo, threshold=0.0)
    assert isinstance(found, Found) and found.boxes.shape == (7, 4) and found.scores.shape == (7,)
    assert found.names == [PETS.names[label] for label in found.labels.tolist()]
    assert (found.scores.diff() <= 0).all()
    image = Image.open(photo)
    pixels = np.array(image)
    kinds = [Path(photo), image, pixels, torch.from_numpy(pixels).permute(2, 0, 1)]
    for other in (*(detr(kind, threshold=0.0) for kind in kinds), *detr(kinds, threshold=0.0, batch_size=3)):
        assert other.names == found.names
        torch.testing.assert_close(other.boxes, found.boxes, rtol=0, atol=1e-2)
    middle = found.scores[3].item()
    assert (detr(photo, threshold=middle).scores >= middle).all() and len(detr(photo, threshold=middle).scores) == 4
    assert detr([]) == [] and detr(photo, threshold=1.0).boxes.shape == (0, 4)


@pytest.mark.parametrize("dc5", [False, True])
def test_official_files_predict_with_the_names_of_coco(dc5: bool, tmp_path: Path) -> None:
    small = dict(hidden_dim=32, enc_layers=1, dec_layers=1, dim_feedforward=64, num_queries=5)
    model = ModelConfig(**{"backbone": "resnet18", "backbone_weights": "none", "norm": "frozen", **small}, dilation=dc5)
    config = Config(model=model).resolve()
    torch.manual_seed(0)
    original = build_model(config.model, config.attn, 91).eval()
    with torch.no_grad():
        original.class_embed.bias[17] += 5  # a cat; contiguous labels would call it otherwise
    file = tmp_path / "detr.pth"
    torch.save({"model": original.state_dict()}, file)
    image = Image.open(write_image(tmp_path / "photo.png", 60, 60))
    found = load(file, "cpu", dc5=dc5)(image, threshold=0.0)
    assert found.names == ["cat"] * 5
    batch = normalize(pad_images([resize(to_tensor(image), (800, 800))]))
    with torch.no_grad():
        logits, boxes = original(*batch)
    torch.testing.assert_close(found.boxes, cxcywh_to_xyxy(boxes[-1, 0][found.queries]) * 60, rtol=0, atol=1e-2)
    torch.testing.assert_close(found.scores, logits[-1, 0].softmax(-1)[found.queries, 17], rtol=1e-4, atol=1e-6)


def test_files_of_other_classes_or_models_are_refused(checkpoint: str, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    torch.save({"model": content["model"]}, tmp_path / "mine.pth")
    with pytest.raises(UserError, match="mine.pth: has 2 classes without names"):
        load(tmp_path / "mine.pth")
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: not a checkpoint"):
        load(tmp_path / "other.pth")
    with pytest.raises(UserError, match="not dilated"):
        load(checkpoint, dc5=True)


@pytest.mark.parametrize(
    "image, words",
    [
        (torch.zeros(60, 90, 3, dtype=torch.uint8), r"\(3, height, width\)"),
        (torch.zeros(3, 60, 90), "float32"),
        (np.zeros((3, 60, 90), np.uint8), r"\(height, width, 3\)"),
        (np.zeros((60, 90, 3)), "float64"),
        (42, "int is no image"),
        ("nothing.jpg", "nothing.jpg: no such file"),
    ],
)
def test_what_is_no_image_is_said(image: Any, words: str, checkpoint: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(checkpoint, "cpu")(image)


def test_weights_that_have_diverged_find_nothing_quietly_never(checkpoint: str) -> None:
    detr = load(checkpoint, "cpu")
    with torch.no_grad():
        plain(detr.model).class_embed.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        detr(np.zeros((60, 90, 3), np.uint8))


def test_package_and_help_come_without_torch() -> None:
    code = (
        "import sys, detr_fabric\nfrom detr_fabric.predict import main\nsys.argv = ['predict', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print('code', end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "--attention" in done.stdout and done.stdout.endswith("code 0 False\n"), done.stderr
    with pytest.raises(ImportError):
        from detr_fabric import nothing  # noqa: F401
