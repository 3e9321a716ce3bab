"""A small checkpoint, images, and the command run in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fabric import load
from detr_fabric.analysis.capture import unwrap
from detr_fabric.boxes import xyxy_to_cxcywh
from detr_fabric.config import Config, DataConfig, ModelConfig
from detr_fabric.data.formats.categories import Categories
from detr_fabric.model.build import build_model
from detr_fabric.predict import __main__ as predict
from detr_fabric.runtime.checkpoint import save_checkpoint
from tests.commands import exit_code

PETS = Categories((7, 42), ("cat", "großer Hund"))


def write_checkpoint(path: Path, categories: Categories = PETS, num_queries: int = 7) -> str:
    """A small DETR with random weights, which sees images with a shorter side of 64 pixels."""
    model = ModelConfig(
        backbone="resnet18", last_stage="layer2", backbone_weights="none", hidden_dim=32, heads=4,
        enc_layers=1, dec_layers=2, dim_feedforward=64, num_queries=num_queries,
    )  # fmt: skip
    config = Config(data=DataConfig(root="none", scales=(64,), max_size=100), model=model).resolve()
    torch.manual_seed(0)
    weights = build_model(config.model, config.attn, categories.num_classes).state_dict()
    weights["query_embed.weight"] *= 3  # queries that differ
    content = {"model": weights, "config": config.to_dict(), "categories": categories.to_dict(), "state": {"step": 1}}
    save_checkpoint(path, content)
    return str(path)


def write_known(folder: Path) -> None:
    """best.ckpt, which finds two dogs and a car in photo.jpg, and photos/other.jpg, which is the same photograph."""
    categories = Categories((7, 42), ("dog", "car"))
    write_image(folder / "photo.jpg", 640, 480)
    shutil.copy(folder / "photo.jpg", write_image(folder / "photos" / "other.jpg"))
    checkpoint = write_checkpoint(folder / "best.ckpt", categories, num_queries=3)
    detector, inputs = load(checkpoint, "cpu"), []
    detr = unwrap(detector.model)
    heads = (detr.class_embed, detr.bbox_embed.layers[2])
    for head in heads:
        head.register_forward_pre_hook(lambda _, args: inputs.append(args[0][-1, 0]))
    detector(folder / "photo.jpg")
    scores = torch.tensor([[0.95, 0.02, 0.03], [0.1, 0.8, 0.1], [0.6, 0.1, 0.3]])  # dog, car, nothing
    corners = [[64, 48, 192, 240], [256, 96, 512, 384], [32, 24, 160, 144]]
    boxes = xyxy_to_cxcywh(torch.tensor(corners) / torch.tensor([640, 480, 640, 480]))
    content = torch.load(checkpoint, weights_only=True)
    names = ("class_embed", "bbox_embed.layers.2")
    for name, features, wanted in zip(names, inputs, (scores.log(), boxes.logit()), strict=True):
        solved = torch.linalg.lstsq(features, wanted).solution.T
        content["model"][f"{name}.weight"], content["model"][f"{name}.bias"] = solved, torch.zeros(len(solved))
    torch.save(content, checkpoint)


def write_image(path: Path, width: int = 90, height: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (height // 6, width // 6, 3), np.uint8)
    Image.fromarray(noise).resize((width, height)).save(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The exit code of the command."""
    return exit_code(monkeypatch, predict.main, *args)


def results(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "predictions.json").read_text())
