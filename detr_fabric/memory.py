"""How much memory a run takes, and what to change when a training step needs more than there is."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from detr_fabric.batch import ImageBatch, Target
from detr_fabric.config import Config
from detr_fabric.errors import UserError

SIGNS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of CUDA, PyTorch's CPU allocator, cuBLAS and cuDNN


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, in GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def whole_memory(device: torch.device) -> float:
    """What there is in all, in GiB: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


@contextmanager
def within_memory(
    cfg: Config, device: torch.device, micro_batches: Sequence[tuple[ImageBatch, list[Target]]], step: int
) -> Iterator[None]:
    """Turns the many errors of exhausted memory into a UserError that names the batch and what to change."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in SIGNS):
            raise
        batch, targets = max(micro_batches, key=lambda micro_batch: micro_batch[0].images.numel())
        count, _, height, width = batch.images.shape
        objects = max(len(target.labels) for target in targets)
        raise UserError(
            f"step {step}: out of memory on {device}, of which {peak_memory(device):.1f} of {whole_memory(device):.1f} "
            f"GiB were used at the most, with a batch of {count} images of {height} x {width} pixels and up to "
            f"{objects} objects; start the same command again with {advice(cfg)}: it goes on from the last checkpoint"
        ) from error


def advice(cfg: Config) -> str:
    """The flags that save memory, those that leave the result as it is first."""
    size, pieces = cfg.train.batch_size, cfg.train.accumulate
    ways = []
    if size > 1:
        factor = next(n for n in range(2, size + 1) if size % n == 0)
        ways.append(f"--train.batch-size {size // factor} --train.accumulate {pieces * factor} (same images a step)")
    if not cfg.model.gradient_checkpointing:
        ways.append("--model.gradient-checkpointing (same gradients, slower)")
    ways.append(f"a --data.max-size below {cfg.data.max_size} (another result: --train.allow-config-change)")
    return ", or ".join(ways)
