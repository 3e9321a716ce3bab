"""Inference: ours beside transformers' DETR of the same weights, images and precision, at batch sizes 1 and 8."""

from __future__ import annotations

from typing import Any

import torch

from detr_fabric.benchmark.baseline import transformers_detr
from detr_fabric.benchmark.measure import Call, PartResult, interleaved, rows
from detr_fabric.benchmark.step import CLASSES, image_sizes, make_batch, model_config
from detr_fabric.config import AttnConfig
from detr_fabric.data.batch import ImageBatch
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR


def measure(device: torch.device, quick: bool) -> PartResult:
    """Times of forward passes without gradients, after a check that both answer the same; batch 8 is padded."""
    cuda = device.type == "cuda"
    config = model_config("resnet18" if quick else "resnet50")
    torch.manual_seed(0)
    model = build_model(config, AttnConfig(), CLASSES).to(device).to(memory_format=torch.channels_last).eval()
    found, missing = [], []
    try:
        baseline = transformers_detr(model, config, CLASSES).to(device).eval()
    except ImportError:
        baseline = None
        missing.append("transformers")
    for count in (1, 2) if quick else (1, 8):
        batch, _ = make_batch(image_sizes(count, cuda and not quick, quick), device)
        calls: dict[str, Call] = {}
        for precision in ("bf16", "float32") if cuda else ("float32",):
            ours = "ours" if precision == ("bf16" if cuda else "float32") else f"ours, {precision}"
            calls[ours] = _ours(model, batch, precision == "bf16")
            if baseline is not None:
                calls[f"transformers, {precision}"] = _baseline(baseline, batch, precision == "bf16")
        if baseline is not None:
            precise = "ours, float32" if cuda else "ours"
            apart = (calls[precise]().pred_boxes[-1] - calls["transformers, float32"]().pred_boxes).abs().max()
            assert apart < 1e-3, f"boxes of ours and of transformers differ by {apart}"
        case = f"{config.backbone}, batch {count}, {batch.images.shape[-2]} x {batch.images.shape[-1]}"
        found += rows(case, interleaved(calls, 0.5 if quick else 20, device), count, "image")
    return PartResult(found, missing)


def _ours(model: DETR, batch: ImageBatch, bf16: bool) -> Call:
    def call() -> Any:
        with torch.no_grad(), torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
            return model(*batch)

    return call


def _baseline(baseline: Any, batch: ImageBatch, bf16: bool) -> Call:
    images, mask = batch.images.contiguous(), (~batch.mask).long()

    def call() -> Any:
        with torch.no_grad(), torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
            return baseline(images, mask)

    return call
