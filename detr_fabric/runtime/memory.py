"""How much memory a run takes, and what to change when a training step needs more than there is."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from detr_fabric.config import Config
from detr_fabric.data.batch import ImageBatch, Target
from detr_fabric.errors import UserError

SIGNS = (
    "out of memory",  # CUDA, NCCL
    "OOM on device",  # PyTorch's other allocator for CUDA
    "ALLOC_FAILED",  # cuBLAS and cuDNN
    "unable to find an engine",  # PyTorch tries cuDNN's ways in turn and swallows that each of them lacked memory
    "Unable to find a valid cuDNN algorithm",  # the same in its older interface
    "an't allocate memory",  # PyTorch's allocator for the CPU
    "annot allocate memory",  # the system, of shared or mapped memory
)


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, in GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError, ValueError):  # ru_maxrss is never less than that of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        (peak,) = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        return peak / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def whole_memory(device: torch.device) -> float:
    """What there is in all, in GiB: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def reset_peak_memory(device: torch.device) -> None:
    """The most memory used counts from now on; on systems that cannot forget it, from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def free_memory() -> float:
    """What the machine can still give, in GiB, to all of its processes; infinity where it does not say."""
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        (available,) = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        return available / 2**20
    return math.inf


def is_exhausted(error: RuntimeError) -> bool:
    """Whether it means that there is no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


@contextmanager
def within_memory(
    cfg: Config, device: torch.device, micro_batches: Sequence[tuple[ImageBatch, list[Target]]], step: int
) -> Iterator[None]:
    """Turns the many errors of exhausted memory into a UserError that names the batch and what to change."""
    try:
        yield
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
        batch, targets = max(micro_batches, key=lambda micro_batch: micro_batch[0].images.numel())
        count, _, height, width = batch.images.shape
        objects = max(len(target.labels) for target in targets)
        raise UserError(
            f"step {step}: out of memory on {device}, of which {peak_memory(device):.1f} of {whole_memory(device):.1f} "
            f"GiB were used at the most, with a batch of {count} images of {height} x {width} pixels and up to "
            f"{objects} objects; start the same command again with {advice(cfg)}: it goes on from the last checkpoint"
        ) from error


def advice(cfg: Config, fitting: int | None = None, max_pixels: int | None = None) -> str:
    """The flags that save memory, those that leave the result as it is first.

    fitting: the largest batch that is known to fit, of so many pixels; None: in the middle of a run nobody knows, so
    half is advised, and that other results take another flag.
    """
    size, pieces = cfg.train.batch_size, cfg.train.accumulate
    limit = size // 2 if fitting is None else fitting
    ways = []
    if limit > 0:
        smaller = max(n for n in range(1, limit + 1) if size * pieces % n == 0)
        way = f"--train.batch-size {smaller} --train.accumulate {size * pieces // smaller}"
        other = fitting is None and cfg.model.norm == "batch"  # batch statistics are of the smaller batches then
        ways.append(f"{way}{' --train.allow-config-change' * other} (same images a step)")
    if limit > 0 and max_pixels is not None:
        with suppress(ValueError):  # less than a single image can have
            replace(cfg.data, max_batch_pixels=max_pixels)
            ways.append(f"--data.max-batch-pixels {max_pixels} (divides the largest batches only)")
    if not cfg.model.gradient_checkpointing:
        ways.append("--model.gradient-checkpointing (same gradients, slower)")
    effect = " (another result: --train.allow-config-change)" if fitting is None else " (another result)"
    ways.append(f"a --data.max-size below {cfg.data.max_size}{effect}")
    return ", or ".join(ways)
