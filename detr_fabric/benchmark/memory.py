"""What a training step of each preset takes on a GPU, simulated: no GPU is needed, and every machine finds the same."""

from __future__ import annotations

from dataclasses import replace

import torch

from detr_fabric.benchmark.measure import PartResult, Row
from detr_fabric.benchmark.simulate import simulate
from detr_fabric.presets import load_preset

SOFTMAX = ("r18_coco", "r34_coco", "r50_coco", "r101_coco", "r50_dc5_coco")
SPARSE = ("r18_sparsemax", "r18_entmax15", "r18_entmax_learned")
SIDE = 1333  # pixels: a flat image is padded below an upright one


def measure(device: torch.device, quick: bool) -> PartResult:
    """Peak memory in bf16 of the largest batch: as many images as the preset takes, padded to 1333 x 1333. Without the
    CUDA context and the workspaces of cuDNN, together 0.5 to 1 GB."""
    side = 128 if quick else SIDE
    found: list[Row] = []
    for preset in ("r18_coco", "r18_sparsemax") if quick else (*SOFTMAX, *SPARSE):
        config = load_preset(preset)
        config = replace(config, data=replace(config.data, root="coco")).resolve()  # pretrained, hence frozen norms
        recomputes = {"softmax": True} if preset in SOFTMAX else {"weights recomputed": True, "weights kept": False}
        for name, recompute in recomputes.items():
            attn = replace(config.attn, recompute=recompute)
            model = replace(config.model, enc_layers=1, dec_layers=1) if quick else config.model
            peak = simulate(model, attn, config.train.batch_size, (side, side)).peak
            case = f"{preset}, {config.train.batch_size} x {side} x {side}"
            found.append({"case": case, "name": f"{name}, simulated", "gib": peak / 2**30})
    return PartResult(found)
