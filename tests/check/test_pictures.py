"""Pictures of a data set: what lies in the files, what training makes of it, and what there is how often."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from detr_fabric.check import pictures
from detr_fabric.check.histograms import CLASSES, histograms
from detr_fabric.config import Config, DataConfig, TrainConfig
from detr_fabric.data.batch import allocate_batch
from detr_fabric.data.build import training_dataset
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.draw import Picture
from tests.checking import checked, clean
from tests.coco_files import coco, image, thing, write_images, write_json, write_root
from tests.format_files import small, write_voc, write_yolo
from tests.patching import Patch

pytestmark = pytest.mark.process
TRAIN = ["train_batches.png", "train_histograms.png", "train_samples.png"]


def written(folder: Path) -> list[str]:
    """The names of the pictures in a folder, each of which can be read."""
    for file in folder.iterdir():
        Image.open(file).load()
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """Settings for small pictures, and for few scenes."""
    data = f"DataConfig(scales=(32, 48), max_size=64, shapes_train=8, shapes_val=4, shapes_dir={str(tmp_path)!r})"
    (tmp_path / "mine.py").write_text(
        "from detr_fabric.config import Config, DataConfig, ModelConfig\n"
        f"config = Config(data={data}, model=ModelConfig(num_queries=9))\n"
    )
    return tmp_path / "mine.py"


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo", "one file", "built-in"])
def test_every_format_is_drawn(kind: str, tmp_path: Path, preset: Path) -> None:
    root, content = tmp_path / "data", small()
    args: list[str | Path] = ["--root", root]
    if kind == "coco":
        write_root(root, content, content)
    elif kind == "voc":
        write_voc(root / "Annotations", content)
        write_images(root / "JPEGImages", content)
    elif kind == "yolo":
        write_images(write_yolo(root, content) / "images", content)
        args = ["--root", root / "data.yaml"]
    elif kind == "one file":
        args = [write_json(root / "a.json", content), "--images", write_images(root / "images", content)]
    else:
        args = ["--builtin", "--annotations-only"]
    code, report, _ = checked(*args, "--pictures", tmp_path / "out" / "deep", "--preset", preset)
    both = kind in ("coco", "yolo", "built-in")
    assert code == 0 and written(tmp_path / "out" / "deep") == TRAIN + both * ["val_histograms.png", "val_samples.png"]
    assert "above 9 queries" in report and f"drawn into {tmp_path / 'out' / 'deep'}: train_samples.png" in report


def test_boxes_lie_on_their_objects_after_augmentation(tmp_path: Path, patch: Patch) -> None:
    places = [(5, 40, 30, 20), (60, 10, 25, 35), (20, 20, 60, 30)] * 3
    content = coco(
        [image(n, width=100, height=80 + 10 * n) for n in range(1, 10)],
        [thing(n, n, place, n % 2 + 1) for n, place in enumerate(places, 1)],
    )
    (tmp_path / "images").mkdir()
    for entry, (x, y, w, h) in zip(content["images"], places, strict=True):
        pixels = np.zeros((entry["height"], entry["width"], 3), np.uint8)
        pixels[y : y + h, x : x + w] = 255
        Image.fromarray(pixels).save(tmp_path / "images" / entry["file_name"])
    annotations = read_annotations(write_json(tmp_path / "a.json", content))
    drawn: list[Picture] = []
    original = pictures.draw
    patch(pictures, "draw", lambda picture, *rest: drawn.append(picture) or original(picture, *rest))
    config = Config(data=DataConfig(root="x", scales=(64, 96)), train=TrainConfig(batch_size=3)).resolve()
    pictures.batches(training_dataset(config.data, tmp_path / "images", annotations, 3), config)
    assert len(drawn) == 9
    for each in drawn:
        for left, top, right, bottom in each.predicted.boxes.round().int().tolist():
            inside = torch.zeros(each.image.shape[1:], dtype=torch.bool)
            inside[top:bottom, left:right] = True
            white = (each.image > 128).all(0) & ~striped(each.image)
            assert (white & inside).sum() >= 0.85 * (white | inside).sum()


def test_an_augmentation_of_ones_own_is_what_is_shown(tmp_path: Path, preset: Path) -> None:
    folder = write_images(tmp_path / "images", clean())
    (tmp_path / "black.py").write_text("def augment(image, target):\n    return image * 0, target\n")
    args = (write_json(tmp_path / "a.json", clean()), "--images", folder, "--preset", preset, "--augment")
    code, report, _ = checked(*args, tmp_path / "black.py", "--pictures", tmp_path / "out")
    assert code == 0 and "not drawn" not in report
    seen = np.array(Image.open(tmp_path / "out" / "train_batches.png"))
    assert (seen[60:] == 0).all(-1).mean() > 0.5  # and white paper around
    (tmp_path / "broken.py").write_text("def augment(image, target):\n    return image\n")
    code, report, _ = checked(*args, tmp_path / "broken.py", "--pictures", tmp_path / "out")
    assert code == 0 and "not drawn: --data.augment" in report and "broken.py: augment on image" in report


def striped(image: torch.Tensor) -> torch.Tensor:
    """Where the colour is that of stripes."""
    return (image.int() - torch.tensor([124, 116, 104])[:, None, None] - 48).abs().amax(0) < 4


def test_a_batch_is_shown_as_the_model_gets_it_with_stripes_on_padding() -> None:
    torch.manual_seed(0)
    batch, views = allocate_batch([(60, 90), (80, 50)])
    for view in views:
        view.copy_(torch.randint(0, 256, view.shape, dtype=torch.uint8))
    shown = pictures.shown((batch, []))
    mask = batch.mask[:, None].expand_as(shown)
    assert torch.equal(shown[~mask], batch.images[~mask])
    padding = shown.permute(0, 2, 3, 1)[batch.mask].unique(dim=0).tolist()
    assert padding == [[124, 116, 104], [172, 164, 152]]  # the mean colour, and a lighter one


def text_of(figure: Figure) -> str:
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    return "\n".join(texts + [axis.get_title() for axis in figure.axes])


def test_of_many_classes_the_most_frequent_are_named_whatever_their_names(tmp_path: Path) -> None:
    odd = ["$a_{b$", "狗", "x\ny", "n" * 80, "<b>"]
    categories = [{"id": n, "name": odd[n - 1] if n <= len(odd) else f"class {n}"} for n in range(1, 366)]
    things = [thing(n, n % 2 + 1, category=1 + n * n % 97) for n in range(1, 400)]
    data = read_annotations(write_json(tmp_path / "a.json", coco(None, things, categories)))
    figure = histograms(data, 100, "data")
    figure.savefig(tmp_path / "a.png")
    bars = figure.axes[0].patches
    counts = sorted(np.bincount(data.labels), reverse=True)
    assert [bar.get_width() for bar in bars] == counts[:CLASSES]
    assert f"365 classes: the 30 with most objects, {365 - len(set(data.labels))} have none" in text_of(figure)
    assert all(len(label.get_text()) <= 24 for label in figure.axes[0].get_yticklabels())


def test_histograms_count_sizes_and_objects_against_queries(tmp_path: Path) -> None:
    images = [{"id": 9, "file_name": "9.png"} if n == 9 else image(n, width=640, height=480) for n in range(1, 10)]
    sides = [20, 20, 50, 200]
    things = [thing(n, 1, (1, 2, side, side)) for n, side in enumerate(sides, 1)]
    things.append(thing(9, 2, (0, 0, 30, 30), iscrowd=1))
    data = read_annotations(write_json(tmp_path / "a.json", coco(images, things)))
    figure = histograms(data, 3, "training data")
    said = text_of(figure)
    for words in (
        "small\n50%",
        "medium\n25%",
        "large\n25%",
        "1 images have more than 3",
        "3 queries",
        "640 x 480 (89%)",
    ):
        assert words in said
    per_image = next(axis for axis in figure.axes if "objects per image" in axis.get_title())
    assert [bar.get_height() for bar in per_image.patches][:5] == [8, 0, 0, 0, 1]
    assert figure.get_suptitle() == "training data: 9 images, 4 objects"
    sizeless = coco([{"id": 1, "file_name": "1.png"}], [thing(1, 1)], [{"id": 1, "name": "cat"}])
    crowd = coco(None, [thing(1, 1, iscrowd=1)])
    for odd, words, times in ((sizeless, "unknown: the annotations", 2), (crowd, "no objects", 2)):
        figure = histograms(read_annotations(write_json(tmp_path / "b.json", odd)), 100, "odd")
        figure.savefig(tmp_path / "b.png")
        assert text_of(figure).count(words) == times
        assert ("1 class" in text_of(figure).split("\n")) == (odd is sizeless)


def test_images_that_cant_be_read_are_left_out_or_said(tmp_path: Path, preset: Path) -> None:
    folder = write_images(tmp_path / "images", clean())
    (folder / "1.png").write_bytes(b"")
    args = (write_json(tmp_path / "a.json", clean()), "--images", folder, "--preset", preset)
    code, report, _ = checked(*args, "--pictures", tmp_path / "out")
    assert code == 1 and written(tmp_path / "out") == TRAIN and "not drawn" not in report
    root = write_root(tmp_path / "root", clean(), clean())
    for file in root.glob("*2017/*.png"):
        file.write_bytes(b"")
    args = ("--root", root, "--annotations-only", "--pictures", tmp_path / "none")
    code, report, _ = checked(*args)
    assert code == 0 and report.count("not drawn: no image with objects can be read") == 2
    assert written(tmp_path / "none") == ["train_histograms.png", "val_histograms.png"]


def test_data_without_objects_have_their_histograms_drawn_and_the_rest_is_said(tmp_path: Path, preset: Path) -> None:
    empty = clean() | {"annotations": []}
    root = write_root(tmp_path / "root", empty, empty)
    code, report, _ = checked("--root", root, "--pictures", tmp_path / "out", "--preset", preset)
    assert code == 1 and report.count("not drawn: no image with objects") == 2
    assert written(tmp_path / "out") == ["train_histograms.png", "val_histograms.png"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["a.json", "--pictures", "out"], "--pictures draws images: name their folder by --images"),
        (["a.json", "--images", "images", "--pictures", "images"], "holds the data's own images"),
        (["a.json", "--images", "images", "--pictures", "a.json/x"], "--pictures a.json/x: .*choose another folder"),
        (["a.json", "--builtin"], "--builtin goes without ANNOTATIONS.json"),
        (["--root", ".", "--builtin"], "goes without"),
        (["a.json", "--preset", "nothing"], "no such preset"),
    ],
)
def test_wrong_commands_are_refused_before_anything_is_drawn(
    args: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", clean())
    write_json(tmp_path / "a.json", clean())
    code, _, error = checked(*args)
    assert code == 2 and re.search(sentence, " ".join(error.split()))
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["1.png", "2.png"]
