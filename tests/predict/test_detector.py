"""Prediction from Python, of our checkpoints and of the original's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fabric import load
from detr_fabric.analysis.capture import unwrap
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.config import Config, ModelConfig
from detr_fabric.data.batch import normalize, pad_images
from detr_fabric.data.images import to_tensor
from detr_fabric.data.transforms import resize
from detr_fabric.errors import UserError
from detr_fabric.model.build import build_model
from detr_fabric.predict.detector import Found
from tests.predict.small import PETS, write_image


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
        unwrap(detr.model).class_embed.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        detr(np.zeros((60, 90, 3), np.uint8))


@pytest.mark.process
def test_package_and_help_come_without_torch() -> None:
    code = (
        "import sys, detr_fabric\nfrom detr_fabric.predict.__main__ import main\nsys.argv = ['predict', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print('code', end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "--attention" in done.stdout and done.stdout.endswith("code 0 False\n"), done.stderr
    with pytest.raises(ImportError):
        from detr_fabric import nothing  # noqa: F401
