"""A training step: ours beside transformers' DETR of the same weights, batch, precision and frozen parameters.

On a GPU also: bfloat16 beside float32, the share of the device's peak that the model's arithmetic reaches, and the peak
memory of a worst-case batch of ResNet-18 without and with gradient checkpointing, beside the simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from detr_fabric.benchmark.baseline import transformers_detr
from detr_fabric.benchmark.measure import Call, PartResult, Row, interleaved, rows
from detr_fabric.benchmark.simulate import simulate
from detr_fabric.config import AttnConfig, ModelConfig, OptimConfig, Part
from detr_fabric.data.batch import ImageBatch, Target, normalize, pad_images
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR
from detr_fabric.optimizer import build_optimizer
from detr_fabric.runtime.arithmetic import allow_tf32

CLASSES = 91
FROZEN: tuple[Part, ...] = ("stem", "layer1")
# Dense peak of bfloat16 and of float32 (without TF32) arithmetic, FLOP a second, as NVIDIA's data sheets give them.
PEAK = {"H200": (989e12, 67e12), "H100": (989e12, 67e12), "A100": (312e12, 19.5e12), "L40": (181e12, 91e12)}


def measure(device: torch.device, quick: bool) -> PartResult:
    """Times of one optimizer step from normalised images: forward, loss, backward, clipping, AdamW; and the operators
    that a GPU is told of in it."""
    cuda = device.type == "cuda"
    allow_tf32("never")
    found: list[Row] = []
    missing: list[str] = []
    for backbone in ("resnet18",) if quick else ("resnet50", "resnet18") if cuda else ("resnet50",):
        config = model_config(backbone)
        part = _compare(config, device, quick)
        simulated = simulate(config, AttnConfig(), 2, (800, 1333))
        row = {"case": f"{backbone} on a GPU, 2 images", "name": "ours, simulated"}
        found += [*part.rows, row | {"operators": simulated.operators.total()}]
        missing = part.missing
    if cuda:
        found += worst_case_memory(device, quick)
    return PartResult(found, missing)


def _compare(config: ModelConfig, device: torch.device, quick: bool) -> PartResult:
    """Ours beside transformers', of one backbone."""
    cuda = device.type == "cuda"
    sizes = image_sizes(8 if cuda and not quick else 2, cuda and not quick, quick)
    missing = []
    batch, targets = make_batch(sizes, device)
    case = f"{config.backbone}, {len(sizes)} images, {batch.images.shape[-2]} x {batch.images.shape[-1]}"
    model = build_model(config, AttnConfig(), CLASSES).to(device).to(memory_format=torch.channels_last).train()
    try:
        baseline = transformers_detr(model, config, CLASSES).to(device).train()
    except ImportError:
        baseline = None
        missing.append("transformers")
    steps: dict[str, Call] = {}
    for precision in ("bf16", "float32") if cuda else ("float32",):
        bf16 = precision == "bf16"
        ours = "ours" if precision == ("bf16" if cuda else "float32") else f"ours, {precision}"
        steps[ours] = our_step(model, batch, targets, bf16)
        if baseline is not None:
            steps[f"transformers, {precision}"] = baseline_step(baseline, batch, targets, bf16)
    found = rows(case, interleaved(steps, 0.5 if quick else 30, device), len(sizes), "image")
    if cuda:
        flops = count_flops(steps["ours"])
        peak = next((value for name, value in PEAK.items() if name in torch.cuda.get_device_name(device)), None)
        for row in found:
            part = None if peak is None else peak[0 if row["name"] in ("ours", "transformers, bf16") else 1]
            row["utilisation"] = None if part is None else flops / len(sizes) / (row["ms"] / 1e3) / part
    return PartResult(found, missing)


def model_config(backbone: Any) -> ModelConfig:
    return ModelConfig(backbone=backbone, backbone_weights="none", norm="frozen", freeze=FROZEN)


def image_sizes(count: int, full: bool, quick: bool) -> list[tuple[int, int]]:
    """Heights and widths of a batch: COCO's after augmentation, or a share of them that suits a CPU."""
    sizes = [(800, 1066), (640, 853), (480, 640), (800, 1204), (1066, 800), (704, 938), (608, 810), (768, 1024)]
    share = 1.0 if full else 0.12 if quick else 0.4
    return [(int(share * h), int(share * w)) for h, w in sizes[:count]]


def make_batch(sizes: list[tuple[int, int]], device: torch.device) -> tuple[ImageBatch, list[Target]]:
    """Normalised noise of the given sizes and 7 objects in each image."""
    torch.manual_seed(0)
    images = pad_images([torch.randint(256, (3, h, w), dtype=torch.uint8) for h, w in sizes])
    targets = [
        Target(
            torch.randint(CLASSES, (7,), device=device),
            torch.cat([torch.rand(7, 2) * 0.4 + 0.3, torch.rand(7, 2) * 0.5 + 0.05], 1).to(device),
            0,
            size,
            size,
        )
        for size in sizes
    ]
    return normalize(ImageBatch(*(part.to(device) for part in images))), targets


def our_step(model: DETR, batch: ImageBatch, targets: list[Target], bf16: bool) -> Call:
    criterion = SetCriterion(CLASSES).to(batch.images.device)
    num_boxes = float(sum(len(target.labels) for target in targets))
    return _step(model, lambda: model(*batch), lambda out: criterion(out, targets, num_boxes).total, batch, bf16)


def baseline_step(baseline: Any, batch: ImageBatch, targets: list[Target], bf16: bool) -> Call:
    """transformers computes its loss in forward, under autocast as its own trainer does."""
    for name, p in baseline.named_parameters():
        p.requires_grad_(".embedder." not in name and ".stages.0." not in name)
    images, mask = batch.images.contiguous(), (~batch.mask).long()
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    return _step(baseline, lambda: baseline(images, mask, labels=labels), lambda out: out.loss, batch, bf16)


def _step(
    model: nn.Module, forward: Callable[[], Any], loss: Callable[[Any], Tensor], batch: ImageBatch, bf16: bool
) -> Call:
    optimizer = build_optimizer(model, OptimConfig())  # of both: what differs is model and loss

    def step() -> None:
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
            outputs = forward()
        loss(outputs).backward()
        clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_flops(call: Call) -> int:
    """Floating-point operations of the matrix products and convolutions that one call runs."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def worst_case_memory(device: torch.device, quick: bool) -> list[Row]:
    """Peak memory of a step of ResNet-18, batch 4, every image 800 x 1333, in bfloat16."""
    found = []
    batch, targets = make_batch([(128, 192) if quick else (800, 1333)] * 4, device)
    for checkpointing in (False, True):
        config = replace(model_config("resnet18"), gradient_checkpointing=checkpointing)
        model = build_model(config, AttnConfig(), CLASSES).to(device).to(memory_format=torch.channels_last).train()
        step = our_step(model, batch, targets, bf16=True)
        torch.cuda.reset_peak_memory_stats(device)
        step(), step()
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        size = (batch.images.shape[-2], batch.images.shape[-1])
        simulated = None if checkpointing else simulate(config, AttnConfig(), len(targets), size).peak / 1e9
        found.append(
            {
                "case": f"resnet18, 4 images, {batch.images.shape[-2]} x {batch.images.shape[-1]}",
                "name": "ours, gradient checkpointing" if checkpointing else "ours",
                "peak_gb": peak,
                "simulated_gb": simulated,
            }
        )
        del model, step
    return found
