"""Exported files: ONNX Runtime and torch.export find in images what the model finds, or no file is written."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from detr_fabric import export, exporting, load
from detr_fabric.analysis.capture import plain
from detr_fabric.batch import ImageBatch, normalize, pad_images
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.checkpoint import save_checkpoint
from detr_fabric.config import AttnConfig, BackboneName, Config, DataConfig, ModelConfig
from detr_fabric.data.annotations import read_annotations
from detr_fabric.data.categories import Categories
from detr_fabric.data.images import read_image
from detr_fabric.errors import UserError
from detr_fabric.model import mappings
from detr_fabric.model.attention import Attention
from detr_fabric.model.backbone import NormedConv
from detr_fabric.model.detr import DETR, build_model
from detr_fabric.portable import Portable, open_onnx, open_torch
from tests.processes import REPOSITORY, python

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLOSE = 1e-4  # what export promises
PETS = Categories((7, 42), ("cat", "großer Hund"))


def write_checkpoint(
    path: Path,
    backbone: BackboneName = "resnet18",
    attn: AttnConfig | None = None,
    categories: Categories = PETS,
    **settings: Any,
) -> str:
    """A real backbone and a small transformer, with random weights large enough that what a head reads matters."""
    small = dict(hidden_dim=32, heads=4, enc_layers=1, dec_layers=1, dim_feedforward=64, num_queries=7)
    model = ModelConfig(backbone=backbone, **{"backbone_weights": "none", "norm": "frozen", **small, **settings})  # type: ignore[arg-type]
    config = Config(DataConfig(root="none", scales=(96,), max_size=160), model, attn or AttnConfig()).resolve()
    torch.manual_seed(0)
    built = build_model(config.model, config.attn, categories.num_classes)
    with torch.no_grad():
        for name, value in built.named_parameters():
            if "in_proj_weight" in name or name == "class_embed.weight":
                value *= 3
            if "alpha_logit" in name:
                value += torch.linspace(-1, 1, len(value))
        for conv in (module for module in built.modules() if isinstance(module, NormedConv)):
            norm = conv.norm[0]  # so that random weights neither fade nor explode
            norm.running_var.uniform_(0.5, 2.0)
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.bias.uniform_(-0.2, 0.2)
    content = {"model": built.state_dict(), "config": config.to_dict(), "categories": categories.to_dict()}
    save_checkpoint(path, {**content, "state": {"step": 1}})
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, args)])
    try:
        export.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def noise(batch: int, height: int, width: int) -> ImageBatch:
    """The first image fills the batch, the second a half of each side, the third a third."""
    coarse = torch.randint(0, 256, (batch, 3, 12, 12), generator=torch.Generator().manual_seed(height)).float()
    images = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255).byte()
    return pad_images([image[:, : height // n, : width // n] for n, image in enumerate(images, 1)])


def reference(model: DETR, batch: ImageBatch) -> tuple[Tensor, Tensor]:
    """The probability of every class (B, Q, C) and boxes (B, Q, 4) xyxy."""
    with torch.no_grad():
        outputs = model(*normalize(batch))
    return outputs.pred_logits[-1].softmax(-1)[..., :-1], cxcywh_to_xyxy(outputs.pred_boxes[-1])


def assert_same(found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    (scores, labels, boxes), (probabilities, true_boxes) = found, expected
    torch.testing.assert_close(scores, probabilities.amax(-1), rtol=0, atol=CLOSE)
    torch.testing.assert_close(scores, probabilities.gather(-1, labels[..., None])[..., 0], rtol=0, atol=CLOSE)
    torch.testing.assert_close(boxes, true_boxes, rtol=0, atol=CLOSE)


CROSS_SPARSEMAX, CROSS_ENTMAX15 = (AttnConfig("softmax", decoder_cross=kind) for kind in ("sparsemax", "entmax15"))
LEARNED = AttnConfig("entmax-learned", alpha=1.3)
OTHERS = [
    ("onnx", "resnet50", CROSS_SPARSEMAX, {}),
    ("onnx", "resnet18", AttnConfig("entmax15"), {"dec_layers": 2}),
    ("onnx", "resnet18", LEARNED, {"position": "learned"}),
    ("onnx", "resnet18", AttnConfig("sigmoid", decoder_self="relu", decoder_cross="softmax1"), {"dilation": True}),
    ("onnx", "resnet34", AttnConfig("entmax", alpha=1.2), {"pre_norm": True, "norm": "batch"}),
    ("onnx", "resnet101", AttnConfig("sparsemax", decoder_cross="topk", topk=5), {"last_stage": "layer2"}),
    ("torch", "resnet50", AttnConfig("entmax15", decoder_cross="sigmoid"), {"position": "learned"}),
    ("torch", "resnet18", AttnConfig("topk", decoder_self="relu", decoder_cross="softmax1", topk=5), {}),
    ("torch", "resnet18", LEARNED, {"norm": "batch"}),
]


class Exported(NamedTuple):
    """A checkpoint, its exported file, and what the command said."""

    checkpoint: str
    file: Path
    said: str


def export_file(
    folder: Path, kind: str, backbone: BackboneName = "resnet18", attn: AttnConfig | None = None, **settings: Any
) -> Exported:
    file = write_checkpoint(folder / "best.ckpt", backbone, attn, **settings)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(said), redirect_stderr(said):
        assert run(monkeypatch, file, "--format", kind) == 0, said.getvalue()
    return Exported(file, folder / ("best.onnx" if kind == "onnx" else "best.pt2"), said.getvalue())


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_file(tmp_path_factory.mktemp("run"), "onnx")


def assert_finds_the_same(exported: Exported) -> None:
    model = plain(load(exported.checkpoint, "cpu").model)
    find = (open_onnx if exported.file.suffix == ".onnx" else open_torch)(exported.file)
    # In the second, pixel 60 of 120, where padding starts, is one at which ONNX Runtime's own resizing reads pixel 59.
    for batch in (noise(1, 96, 130), noise(3, 120, 121), noise(2, 34, 47)):
        assert_same(find(*batch), reference(model, batch))
    # What was compared is no constant: neither over images and queries, nor without mask, nor with another mapping.
    batch = noise(3, 120, 121)
    scores, _, boxes = find(*batch)
    assert boxes.std(0).max() > 10 * CLOSE and boxes.std(1).max() > 10 * CLOSE and scores.std() > 10 * CLOSE
    assert (find(batch.images, torch.zeros_like(batch.mask))[2] - boxes).abs().max() > 10 * CLOSE
    for module in model.modules():
        if isinstance(module, Attention):
            module.mapping = "sparsemax" if module.mapping == "softmax" else "softmax"
    assert (reference(model, batch)[1] - boxes).abs().max() > 10 * CLOSE
    # Padding may hold anything.
    filled = torch.where(batch.mask[:, None], 255, batch.images)
    torch.testing.assert_close(find(filled, batch.mask)[2], boxes, rtol=0, atol=0)


def test_onnx_finds_what_the_model_finds_at_any_size_and_batch(onnx_file: Exported) -> None:
    assert_finds_the_same(onnx_file)


@pytest.mark.parametrize(
    "kind, backbone, attn, settings",
    [
        ("onnx", "resnet18", CROSS_SPARSEMAX, {"last_stage": "layer1"}),
        ("torch", "resnet18", CROSS_ENTMAX15, {"last_stage": "layer1"}),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS),
    ],
)
def test_so_do_both_formats_with_other_backbones_and_mappings(
    kind: str, backbone: BackboneName, attn: AttnConfig, settings: dict[str, Any], tmp_path: Path
) -> None:
    assert_finds_the_same(export_file(tmp_path, kind, backbone, attn, **settings))


def test_every_mapping_becomes_onnx(tmp_path: Path) -> None:
    """Rows that need many steps, too: there the exported number of steps is fixed."""

    class All(nn.Module):
        def forward(self, scores: Tensor) -> tuple[Tensor, ...]:
            alpha = torch.tensor([1.001, 1.1, 1.5, 1.97])[:, None, None]
            named = (mappings.softmax, mappings.sparsemax, mappings.entmax15, mappings.sigmoid, mappings.relu)
            return (
                *(mapping(scores) for mapping in (*named, mappings.softmax1)),
                mappings.entmax(scores, alpha),
                mappings.topk(scores, 5),
            )

    def rows(width: int) -> Tensor:
        """(2, 4, 20, width), from flat to steep, and with forbidden keys."""
        scores = torch.randn(2, 4, 20, width, generator=torch.Generator().manual_seed(width))
        scores *= torch.logspace(-3, 2, 20)[:, None]
        scores[1, ..., width // 2 :] = -torch.inf
        return scores

    shapes = ({3: torch.export.Dim("width", min=2, max=5000)},)
    torch.onnx.export(All().eval(), (rows(9),), tmp_path / "m.onnx", dynamo=True, verbose=False, dynamic_shapes=shapes)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for width in (3, 60, 4000):
        found = session.run(None, {"scores": rows(width).numpy()})
        for number, (mine, expected) in enumerate(zip(found, All()(rows(width)), strict=True)):
            np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5, err_msg=f"mapping {number}, {width} keys")


def test_real_images_are_found_alike_by_the_description_alone(onnx_file: Exported, coco_mini: Path) -> None:
    about = json.loads(Path(f"{onnx_file.file}.json").read_text())
    prepare, find, detector = about["preparation"], open_onnx(onnx_file.file), load(onnx_file.checkpoint, "cpu")
    for path in sorted((coco_mini / "val2017").iterdir())[:10]:
        image = read_image(path)
        height, width = image.shape[-2:]
        factor = min(prepare["shorter_side"] / min(height, width), prepare["longest_side"] / max(height, width))
        resized = detector.prepare(image).image
        assert all(abs(new - old * factor) <= 1 for new, old in zip(resized.shape[1:], (height, width), strict=True))
        scores, labels, boxes = find(resized[None].contiguous(), torch.zeros(1, *resized.shape[1:], dtype=torch.bool))
        expected = detector(path, threshold=0.0)
        order = expected.queries
        torch.testing.assert_close(scores[0][order], expected.scores, rtol=0, atol=CLOSE)
        assert [about["classes"][label]["name"] for label in labels[0][order].tolist()] == expected.names
        pixels = boxes[0][order] * torch.tensor([width, height, width, height])
        torch.testing.assert_close(pixels, expected.boxes, rtol=0, atol=CLOSE * max(height, width))


def test_the_description_names_classes_sizes_and_what_was_checked(onnx_file: Exported) -> None:
    checkpoint, file, said = onnx_file
    assert re.search(r"largest difference .* on 10 built-in scenes", said) and str(file) in said
    assert "the validation data of training can't be used: none" in said
    assert sorted(path.name for path in file.parent.iterdir()) == ["best.ckpt", "best.onnx", "best.onnx.json"]
    about = json.loads(Path(f"{file}.json").read_text())
    assert about["classes"] == [
        {"label": 0, "category_id": 7, "name": "cat"},
        {"label": 1, "category_id": 42, "name": "großer Hund"},
    ]
    prepare = about["preparation"]
    assert (prepare["shorter_side"], prepare["longest_side"], prepare["smallest_side"]) == (96, 160, 33)
    assert about["checked"]["largest_difference"] <= CLOSE and about["checked"]["images"] == 10
    import onnx

    content = onnx.load(file)
    onnx.checker.check_model(content)
    declared = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*content.graph.input, *content.graph.output)
    }
    assert declared == {name: value["shape"] for name, value in (about["inputs"] | about["outputs"]).items()}
    assert str(REPOSITORY).encode() not in file.read_bytes()


def test_a_file_is_tried_on_the_images_asked_for_and_scenes_take_the_place_of_those_missing(
    coco_mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    categories = read_annotations(coco_mini / "annotations" / "instances_val2017.json").categories
    detector = load(write_checkpoint(tmp_path / "best.ckpt", categories=categories), "cpu")
    limits = exporting.sides(detector.config.model)

    def tried(**settings: Any) -> str:
        images, source = exporting.trial_images(detector, export.Settings(**settings), limits)
        assert len(images) == 10 and all(33 <= side <= 160 for image in images for side in image.shape[1:])
        assert exporting.padded(images[:3]).mask.any()
        return source

    data = DataConfig(root=str(coco_mini))
    assert tried(data=data) == "10 images of the validation data"
    assert tried(data=detector.config.data) == "10 built-in scenes"  # its own data is gone
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (300, 200)).save(folder / "a.png")
    Image.new("RGB", (900, 20)).save(folder / "thin.png")  # less than two features high
    (folder / "page.jpg").write_text("<html>")
    assert tried(images=(str(folder),), data=data) == f"1 images of {folder} and 9 built-in scenes"
    assert "page.jpg" in capsys.readouterr().err
    with pytest.raises(UserError, match="nowhere"):
        tried(data=DataConfig(root="nowhere"))


def test_official_files_are_described_with_cocos_ids(tmp_path: Path) -> None:
    categories = Categories((1, 90), ("person", "toothbrush"), "coco91")
    detector = load(write_checkpoint(tmp_path / "best.ckpt", categories=categories), "cpu")
    settings, limits = export.Settings(format="torch"), exporting.sides(detector.config.model)
    about = exporting.describe(detector, "x.pth", settings, limits, exporting.Difference(0.0, 0))
    assert len(about["classes"]) == 91
    assert about["classes"][90] == {"label": 90, "category_id": 90, "name": "toothbrush"}
    assert about["classes"][12] == {"label": 12, "category_id": 12, "name": "N/A"}


# What does not find the same is not written


Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def stand_in(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Replaces what takes long: the program is the model itself, whose answers are changed."""
    models: list[Portable] = []
    monkeypatch.setattr(exporting, "to_program", lambda model, limits: models.append(Portable(copy.deepcopy(model))))
    monkeypatch.setattr(exporting, "save_torch", lambda program, path: path.write_text("new"))
    monkeypatch.setattr(exporting, "open_torch", lambda path: lambda *batch: change(*models[-1](*batch)))


@torch.no_grad()
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda scores, labels, boxes: (scores, labels, boxes + 2e-4), "2.0e-04 off"),
        (lambda scores, labels, boxes: (scores * 0.99, labels, boxes), "off the model's"),
        (lambda scores, labels, boxes: (scores, 1 - labels, boxes), "off the model's"),
        (lambda scores, labels, boxes: (scores, labels, boxes * torch.nan), "inf off"),
        (lambda scores, labels, boxes: (scores, labels, boxes + 2e-5), None),
    ],
)
def test_a_file_whose_answers_differ_is_not_written(
    change: Change,
    words: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in(monkeypatch, change)
    file = write_checkpoint(tmp_path / "best.ckpt")
    (tmp_path / "best.pt2").write_text("old")
    code = run(monkeypatch, file, "--format", "torch")
    names = {path.name for path in tmp_path.iterdir()}
    if words is None:
        assert code == 0 and (tmp_path / "best.pt2").read_text() == "new"
        assert names == {"best.ckpt", "best.pt2", "best.pt2.json"}
    else:
        assert code == 2 and (tmp_path / "best.pt2").read_text() == "old" and names == {"best.ckpt", "best.pt2"}
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert "best.pt2 is not written" in line and words in line


@torch.no_grad()
def test_a_label_may_differ_between_classes_that_score_alike_and_is_counted(tmp_path: Path) -> None:
    model = plain(load(write_checkpoint(tmp_path / "best.ckpt"), "cpu").model)
    model.class_embed.weight[1] = model.class_embed.weight[0]
    model.class_embed.bias[1] = model.class_embed.bias[0]
    portable = Portable(copy.deepcopy(model))

    def other(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, labels, boxes = portable(images, mask)
        return scores, 1 - labels, boxes

    found = exporting.difference(model, other, [torch.zeros(3, 64, 64, dtype=torch.uint8)])
    assert found.largest <= 1e-6 and found.labels == 2 * 7  # alone, and in a batch


# Mistakes


@pytest.mark.parametrize(
    "args, sentence",
    [
        ([], "name a checkpoint"),
        (["nothing.ckpt"], "nothing.ckpt: no such file"),
        (["notes.txt"], "notes.txt: can't be read as a checkpoint"),
        (["best.ckpt", "--out", "/dev/null/x.onnx"], "--out /dev/null/x.onnx: .*give a file elsewhere"),
        (["best.ckpt", "--out", "."], "--out .: it is a folder"),
        (["best.ckpt", "--images", "nothing"], "nothing: no such file or folder"),
        (["best.ckpt", "--dc5"], "not dilated"),
        (["best.ckpt", "--data.root", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_in_one_sentence_and_leave_no_file(
    args: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "best.ckpt")
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert run(monkeypatch, *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{sentence}", line), line
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "notes.txt"}


def test_missing_packages_are_named_with_the_command_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(export, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    assert run(monkeypatch, write_checkpoint(tmp_path / "best.ckpt")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install onnx onnxscript onnxruntime" in line and "--format torch" in line


def test_weights_that_have_diverged_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, lambda *answers: answers)
    file = write_checkpoint(tmp_path / "best.ckpt")
    content = torch.load(file, weights_only=True)
    content["model"]["class_embed.bias"].fill_(torch.nan)
    save_checkpoint(Path(file), content, keep_previous=False)
    assert run(monkeypatch, file, "--format", "torch") == 2
    assert "not finite" in capsys.readouterr().err


def test_the_command_line_writes_a_program_that_needs_nothing_of_the_package(tmp_path: Path) -> None:
    shown = python("-m", "detr_fabric.export", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "--format" in shown.stdout
    file = write_checkpoint(tmp_path / "best.ckpt", last_stage="layer2")
    done = python("-m", "detr_fabric.export", file, "--format", "torch", "--out", "a/b.pt2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = (tmp_path / "a" / "b.pt2").read_bytes()
    assert str(REPOSITORY).encode() not in content
    graph = torch.export.load(tmp_path / "a" / "b.pt2").graph_module
    targets = {
        str(node.target) for m in graph.modules() if isinstance(m, torch.fx.GraphModule) for node in m.graph.nodes
    }
    assert not any("detr_fabric" in target for target in targets)
