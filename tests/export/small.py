"""A small checkpoint, its export, and what the two are compared with."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.config import AttnConfig, BackboneName, Config, DataConfig, LossConfig, ModelConfig
from detr_fabric.data.batch import ImageBatch, normalize, pad_images
from detr_fabric.data.formats.categories import Categories
from detr_fabric.export import __main__ as export
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR, class_scores
from detr_fabric.model.folded_norm import NormedConv
from detr_fabric.runtime.checkpoint import save_checkpoint
from tests.commands import exit_code

CLOSE = 1e-4  # what export promises
PETS = Categories((7, 42), ("cat", "großer Hund"))


def write_checkpoint(
    path: Path,
    backbone: BackboneName = "resnet18",
    attn: AttnConfig | None = None,
    categories: Categories = PETS,
    loss: LossConfig | None = None,
    **settings: Any,
) -> str:
    """A real backbone and a small transformer, with random weights large enough that what a head reads matters."""
    small = dict(hidden_dim=32, heads=4, enc_layers=1, dec_layers=1, dim_feedforward=64, num_queries=7)
    model = ModelConfig(backbone=backbone, **{"backbone_weights": "none", "norm": "frozen", **small, **settings})  # type: ignore[arg-type]
    config = Config(
        DataConfig(root="none", scales=(96,), max_size=160), model, attn or AttnConfig(), loss or LossConfig()
    ).resolve()
    torch.manual_seed(0)
    built = build_model(config.model, config.attn, categories.num_classes, focal=config.loss.kind == "focal")
    with torch.no_grad():
        for name, value in built.named_parameters():
            if "in_proj_weight" in name or name == "class_embed.weight":
                value *= 3
            if name == "bbox_embed.layers.2.weight" and not value.any():
                value.normal_(std=0.3)
            if name == "class_embed.bias" and built.focal:
                value.zero_()  # it starts where every score is about 0.01
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
    return exit_code(monkeypatch, export.main, *args)


def noise(batch: int, height: int, width: int) -> ImageBatch:
    """The first image fills the batch, the second a half of each side, the third a third."""
    coarse = torch.randint(0, 256, (batch, 3, 12, 12), generator=torch.Generator().manual_seed(height)).float()
    images = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255).byte()
    return pad_images([image[:, : height // n, : width // n] for n, image in enumerate(images, 1)])


def reference(model: DETR, batch: ImageBatch) -> tuple[Tensor, Tensor]:
    """The probability of every class (B, Q, C) and boxes (B, Q, 4) xyxy."""
    with torch.no_grad():
        outputs = model(*normalize(batch))
    return class_scores(outputs.pred_logits[-1], model.focal), cxcywh_to_xyxy(outputs.pred_boxes[-1])


def assert_same(found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    (scores, labels, boxes), (probabilities, true_boxes) = found, expected
    torch.testing.assert_close(scores, probabilities.amax(-1), rtol=0, atol=CLOSE)
    torch.testing.assert_close(scores, probabilities.gather(-1, labels[..., None])[..., 0], rtol=0, atol=CLOSE)
    torch.testing.assert_close(boxes, true_boxes, rtol=0, atol=CLOSE)


CROSS_SPARSEMAX, CROSS_ENTMAX15 = (AttnConfig("softmax", decoder_cross=kind) for kind in ("sparsemax", "entmax15"))
LEARNED = AttnConfig("entmax-learned", alpha=1.3)
FOCAL = {"loss": LossConfig(kind="focal"), "cross_attention": "conditional", "dec_layers": 2}
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
