"""The largest batch that can occur, tried before the first step: does it fit into memory, and if not, what does?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detr_fabric.config import DataConfig
from detr_fabric.data.batch import ImageBatch, Size, Target, padded_size
from detr_fabric.data.transforms import CROP_SIDES, resized_size
from detr_fabric.errors import UserError
from detr_fabric.loss.criterion import forward_backward
from detr_fabric.model.batch_statistics import BatchStatistics
from detr_fabric.runtime.memory import (
    advice,
    free_memory,
    is_exhausted,
    peak_memory,
    reset_peak_memory,
    whole_memory,
)
from detr_fabric.runtime.nonfinite import local_forward
from detr_fabric.runtime.ranks import max_over_ranks
from detr_fabric.runtime.run import Run

FORESEEN_PIXELS = 2**20  # of a batch, above which its memory is foreseen


class BatchSize(NamedTuple):
    """Images of a batch and their padded size in pixels."""

    images: int
    height: int
    width: int


def preflight(run: Run) -> str:
    """Runs the largest batches forward and backward, and returns a line about the memory they took. Raises UserError,
    on every rank alike, with what to change if it was too much for any of them.

    It leaves nothing behind: no gradients, batch statistics or generator states. DDP takes no part, so each rank can
    find out by itself what fits.
    """
    cfg, device, sizes = run.cfg, run.fabric.device, run.train_loader.dataset.annotations.sizes
    reset_peak_memory(device)
    resting, peak = peak_memory(device), 0.0

    def fits(size: BatchSize) -> bool:
        nonlocal peak
        if device.type == "cpu" and not foreseen(run, size):
            return False
        fitting = rehearse(run, size)
        run.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        peak = max(peak, peak_memory(device))
        return fitting

    worst = worst_batches(cfg.data, cfg.train.batch_size, sizes)
    single, together = largest_shapes(cfg.data, sizes)
    fitting = cfg.train.batch_size
    if not all(fits(size) for size in worst):
        fitting = most(fitting - 1, lambda images: fits(BatchSize(images, *(together if images > 1 else single))))
    measured = torch.tensor([-fitting, peak], device=device)
    everywhere = max_over_ranks(measured).tolist()
    fitting, peak = -int(everywhere[0]), everywhere[1]
    if device.type == "cuda":
        reset_peak_memory(device)
    largest = f"{_text(worst[0])} with {cfg.model.num_queries} objects each"
    memory = f"{whole_memory(device):.1f} GiB of {device}"
    if fitting < cfg.train.batch_size:
        shape = together if fitting > 1 else single
        what = f"{_text(BatchSize(fitting, *shape))} would fit" if fitting else "not even one image fits"
        raise UserError(
            f"a batch of {largest}, the largest that can occur, does not fit into the {memory}; {what}: "
            f"set {advice(cfg, fitting, fitting * math.prod(shape))}"
        )
    if device.type == "cuda":
        return f"memory  at most {peak:.1f} of the {memory}, tried with {largest}"
    took = max(0.0, peak - resting)
    return f"memory  {largest} fit: a step takes {took:.1f} GiB beside this process's {resting:.1f}, of the {memory}"


def foreseen(run: Run, size: BatchSize) -> bool:
    """Whether a batch can fit into the machine's memory, by that of one of its images; true for small batches.

    A system promises more memory than it has, and kills the process that takes it at its word: a CPU cannot just try.
    """
    if size.images == 1 or size.images * size.height * size.width < FORESEEN_PIXELS:
        return True
    device, available = run.fabric.device, free_memory() / run.fabric.world_size
    reset_peak_memory(device)
    resting = peak_memory(device)
    fitting = rehearse(run, size._replace(images=1))
    run.optimizer.zero_grad()
    return fitting and size.images * (peak_memory(device) - resting) <= available


def _text(size: BatchSize) -> str:
    return f"{size.images} image{'s' * (size.images > 1)} of {size.height} x {size.width} pixels"


def most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, by bisection; 0 where none does."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def worst_batches(data: DataConfig, batch_size: int, sizes: np.ndarray) -> list[BatchSize]:
    """The batches of a resolved config that may need the most memory. It is one; with a limit of pixels two, because a
    few large images need the most for attention, and more of a smaller size the most for features.

    sizes: (N, 2) height and width of the images, 0 where they are unknown.
    """
    single, together = largest_shapes(data, sizes)
    if batch_size == 1:
        return [BatchSize(1, *single)]
    limit = data.max_batch_pixels or math.inf
    if batch_size * math.prod(together) <= limit:
        return [BatchSize(batch_size, *together)]
    fitting = int(limit // math.prod(together))
    few = BatchSize(fitting, *together) if fitting > 1 else BatchSize(1, *single)
    more = max(2, fitting + 1)
    scale = math.sqrt(limit / more / math.prod(together))
    return [few, BatchSize(more, *(int(scale * side) for side in together))]


def largest_shapes(data: DataConfig, sizes: np.ndarray) -> tuple[Size, Size]:
    """The largest padded shape of one image, and of several together: a flat one is padded below an upright one."""
    assert data.scales is not None and data.max_size is not None, "resolve the config first"
    known = (sizes > 0).all(1)
    originals = np.unique(sizes[known], axis=0).tolist()
    shapes = [resized_size(h, w, scale, data.max_size) for h, w in originals for scale in data.scales]
    scale = max(data.scales)
    longest = [] if known.all() and data.augment == "original" else [data.max_size]
    if data.crop:
        longest.append(min(scale * max(CROP_SIDES) // min(CROP_SIDES), data.max_size))
    shapes += [shape for side in longest for shape in ((side, scale), (scale, side))]
    single = max((padded_size([shape], data.pad_multiple) for shape in shapes), key=math.prod)
    return single, padded_size(shapes, data.pad_multiple)


def rehearse(run: Run, size: BatchSize) -> bool:
    """Whether a batch of this size fits into memory beside the optimizer's moments and, where a step has several
    micro-batches, the gradients of an earlier one. Leaves gradients behind."""
    cfg, detr, device = run.cfg, run.model.module, run.fabric.device
    trained = [p for p in detr.parameters() if p.requires_grad]
    statistics = BatchStatistics(detr)
    several = cfg.train.accumulate > 1 or cfg.data.max_batch_pixels is not None
    try:
        # what AdamW allocates in its first step
        moments = [torch.empty_like(p) for p in trained if p not in run.optimizer.optimizer.state for _ in range(2)]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for _ in range(1 + several):
                images = torch.zeros(size.images, 3, size.height, size.width, dtype=torch.uint8)
                mask = torch.zeros(size.images, size.height, size.width, dtype=torch.bool)
                targets = [full_target(cfg.model.num_queries, size)] * size.images
                normalizers = torch.tensor(run.criterion.normalizers(targets, cfg.model.num_queries), device=device)
                micro_batch = run.fabric.to_device((ImageBatch(images, mask), targets))
                forward_backward(
                    local_forward(run.fabric, detr), run.criterion, micro_batch, normalizers, Tensor.backward
                )
        del moments
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
        return False
    finally:
        statistics.restore()
    return True


def full_target(queries: int, size: BatchSize) -> Target:
    """As many objects as there are queries, all alike."""
    shape = (size.height, size.width)
    return Target(torch.zeros(queries, dtype=torch.int64), torch.full((queries, 4), 0.5), 0, shape, shape)
