"""Exported files: ONNX Runtime and torch.export find in images what the model finds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from detr_fabric import load
from detr_fabric.analysis.capture import unwrap
from detr_fabric.config import AttnConfig, BackboneName, DataConfig
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.images import read_image
from detr_fabric.errors import UserError
from detr_fabric.export import trial, verified
from detr_fabric.export.graph import open_onnx, open_torch
from detr_fabric.export.settings import Settings
from detr_fabric.model import entmax, mappings
from detr_fabric.model.attention import Attention
from tests.commands import REPOSITORY
from tests.export.small import (
    CLOSE,
    CROSS_ENTMAX15,
    CROSS_SPARSEMAX,
    FOCAL,
    OTHERS,
    Exported,
    assert_same,
    export_file,
    noise,
    reference,
    write_checkpoint,
)

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_file(tmp_path_factory.mktemp("run"), "onnx")


def assert_finds_the_same(exported: Exported) -> None:
    model = unwrap(load(exported.checkpoint, "cpu").model)
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
        ("onnx", "resnet18", CROSS_SPARSEMAX, {"last_stage": "layer1", **FOCAL}),
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
            named = (entmax.softmax, entmax.sparsemax, entmax.entmax15, mappings.sigmoid, mappings.relu)
            return (
                *(mapping(scores) for mapping in (*named, mappings.softmax1)),
                entmax.entmax_up_to(2.0, scores, alpha),
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
    limits = verified.sides(detector.config.model)

    def tried(**settings: Any) -> str:
        images, source = trial.trial_images(detector, Settings("best.ckpt", **settings), limits)
        assert len(images) == 10 and all(33 <= side <= 160 for image in images for side in image.shape[1:])
        assert trial.padded(images[:3]).mask.any()
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
    settings, limits = Settings("x.pth", format="torch"), verified.sides(detector.config.model)
    about = verified.describe(detector, settings, limits, trial.Difference(0.0, 0))
    assert len(about["classes"]) == 91
    assert about["classes"][90] == {"label": 90, "category_id": 90, "name": "toothbrush"}
    assert about["classes"][12] == {"label": 12, "category_id": 12, "name": "N/A"}
