"""What the numbers of a run are computed in on a GPU: whether bfloat16 is the card's own, and where TF32 is used."""

from __future__ import annotations

import warnings

import torch

from detr_fabric.config import TF32


def computes_in_bf16(gpus: int) -> bool:
    """Whether the first so many GPUs do, all of them, because ranks have to agree; others only emulate it.

    Only their properties are read, which opens no context on the GPU of another rank.
    """
    return torch.version.hip is not None or all(torch.cuda.get_device_properties(i).major >= 8 for i in range(gpus))


def allow_tf32(where: TF32) -> None:
    """Where float32 may be computed with 10 instead of 23 bits of mantissa, which is much faster on GPUs since 2020."""
    with warnings.catch_warnings():
        # PyTorch's newer switches cannot be used: what reads the older ones then, its compiler too, raises an error.
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = where != "never"
        torch.backends.cuda.matmul.allow_tf32 = where == "everywhere"


def arithmetic(device: torch.device, precision: str, tf32: TF32) -> str:
    """Device and precision in words, with what differs from what one would expect of them."""
    what = f"{device.type} in {precision}"
    if device.type != "cuda":
        return what
    if precision == "bf16-mixed" and not computes_in_bf16(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(device)
        return f"{what}, which {name} only emulates: --train.precision 16-mixed is faster and takes less memory"
    if precision == "32-true":
        where = {"never": "no TF32", "convolutions": "TF32 in convolutions", "everywhere": "TF32 everywhere"}[tf32]
        return f"{what} with {where} (--train.tf32)"
    return what
