"""Small models with sparse attention, images of noise, and checkpoints of such models."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from detr_fabric.analysis.capture import attention_blocks
from detr_fabric.config import AttnConfig, Config, Mapping, ModelConfig
from detr_fabric.data.batch import ImageBatch, Target, pad_images
from detr_fabric.data.build import build_datasets
from detr_fabric.loss.matcher import HungarianMatcher
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR
from detr_fabric.runtime.checkpoint import save_checkpoint

MATCHER = HungarianMatcher()
CLASSES = 3


def small_detr(kind: Mapping = "softmax", **changes: object) -> DETR:
    """2 encoder and 3 decoder layers with random weights, enlarged in the attention so that it is far from even.

    Features are those of patches of 8×8 pixels, which nothing around them can change. (Convolutions at an image's edge
    see what earlier ones made of the padding beside it, in the original too: features themselves depend on padding.)
    """
    small = dict(hidden_dim=32, heads=4, enc_layers=2, dec_layers=3, dim_feedforward=64, num_queries=7, dropout=0.0)
    model = ModelConfig(
        **{"backbone": "resnet18", "last_stage": "layer2", "backbone_weights": "none", "norm": "frozen"},
        **{**small, **changes},
    )
    config = Config(model=model, attn=AttnConfig(kind=kind)).resolve()
    torch.manual_seed(0)
    detr = build_model(config.model, config.attn, CLASSES).eval()
    detr.backbone[0].body = nn.Sequential(OrderedDict(patches=nn.Conv2d(3, 128, 8, stride=8)))
    with torch.no_grad():
        for blocks in attention_blocks(detr).values():
            for block in blocks:
                block.in_proj_weight *= 2
    return detr


def scenes(*sizes: tuple[int, int]) -> list[tuple[Tensor, Target]]:
    """Images of noise, (height, width) each, with two objects and then one fewer or more."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, (height, width) in enumerate(sizes):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        count = 2 + (-1) ** number
        boxes = 0.3 + 0.4 * torch.rand(count, 4, generator=generator)
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        made.append((image, Target(labels, boxes, number, (height, width), (height, width))))
    return made


def batches(made: list[tuple[Tensor, Target]], size: int) -> list[tuple[ImageBatch, list[Target]]]:
    groups = [made[k : k + size] for k in range(0, len(made), size)]
    return [(pad_images([image for image, _ in group]), [target for _, target in group]) for group in groups]


def write_checkpoint(path: Path, config: Config, changes: dict[str, object], attn: AttnConfig) -> Path:
    small = dict(hidden_dim=32, heads=4, enc_layers=1, dec_layers=2, dim_feedforward=64, num_queries=7, dropout=0.0)
    model = ModelConfig(**{"backbone": "resnet18", "last_stage": "layer2", **small, **changes})
    config = replace(config, model=model, attn=attn, train=replace(config.train, name="run")).resolve()
    train, _ = build_datasets(config.data, seed=0)
    torch.manual_seed(0)
    content = {
        "model": build_model(config.model, config.attn, train.categories.num_classes).state_dict(),
        "config": config.to_dict(),
        "categories": train.categories.to_dict(),
        "state": {"step": 12},
    }
    path.parent.mkdir()
    save_checkpoint(path, content)
    return path
