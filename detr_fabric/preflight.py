"""The worst batch that a run can meet, tried before its first step: does it fit into memory, and if not, what does?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor

from detr_fabric.batch import ImageBatch, Target, normalize
from detr_fabric.config import Config, DataConfig
from detr_fabric.data.padding import Shape, padded_shape
from detr_fabric.data.transforms import CROP_SIDES, resized_size
from detr_fabric.errors import UserError
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.memory import advice, is_exhausted, peak_memory, whole_memory
from detr_fabric.nonfinite import BatchStatistics


class Size(NamedTuple):
    """Of a batch."""

    images: int
    height: int
    width: int


def preflight(
    cfg: Config,
    fabric: Fabric,
    model: _FabricModule,
    criterion: SetCriterion,
    optimizer: _FabricOptimizer,
    sizes: np.ndarray,
) -> str:
    """Takes the worst batches forward and backward, and returns a line about what that needed; sizes: as for
    worst_batches. Raises UserError, on every rank alike, with what to change where it was too much for one of them.

    It leaves nothing behind: no gradient, no moved batch statistics and generators. DDP takes no part, so each rank may
    find out for itself how much it can do.
    """
    device = fabric.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def fits(size: Size) -> bool:
        fitting = rehearse(cfg, fabric, model, criterion, optimizer, size)
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return fitting

    worst = worst_batches(cfg.data, cfg.train.batch_size, sizes)
    single, together = largest_shapes(cfg.data, sizes)
    fitting = cfg.train.batch_size
    if not all(fits(size) for size in worst):
        fitting = most(fitting - 1, lambda images: fits(Size(images, *(together if images > 1 else single))))
    measured = torch.tensor([-fitting, peak_memory(device)], device=device)
    everywhere = cast(Tensor, fabric.all_reduce(measured, reduce_op="max")).tolist()
    fitting, peak = -int(everywhere[0]), everywhere[1]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    largest = f"{_text(worst[0])} with {cfg.model.num_queries} objects each"
    memory = f"{whole_memory(device):.1f} GiB of {device}"
    if fitting < cfg.train.batch_size:
        shape = together if fitting > 1 else single
        what = f"{_text(Size(fitting, *shape))} do" if fitting else "not even one does"
        raise UserError(
            f"a batch of {largest}, the largest that can come, does not fit into the {memory}, {what}: "
            f"set {advice(cfg, fitting, fitting * math.prod(shape))}"
        )
    if device.type == "cuda":
        return f"memory  at most {peak:.1f} of the {memory}, tried with {largest}"
    return f"memory  {largest} fit: this process has taken {peak:.1f} of the {memory} at most so far"


def _text(size: Size) -> str:
    return f"{size.images} image{'s' * (size.images > 1)} of {size.height} x {size.width} pixels"


def most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, by bisection; 0 where none does."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def worst_batches(data: DataConfig, batch_size: int, sizes: np.ndarray) -> list[Size]:
    """The batches of a resolved config that may need most. It is one; under a limit of pixels two, for a few large
    images need most for attention, more of a smaller size for features. sizes: (N, 2) height, width of the images, 0
    where they are unknown.
    """
    single, together = largest_shapes(data, sizes)
    if batch_size == 1:
        return [Size(1, *single)]
    limit = data.max_batch_pixels or math.inf
    if batch_size * math.prod(together) <= limit:
        return [Size(batch_size, *together)]
    fitting = int(limit // math.prod(together))
    few = Size(fitting, *together) if fitting > 1 else Size(1, *single)
    more = max(2, fitting + 1)
    scale = math.sqrt(limit / more / math.prod(together))
    return [few, Size(more, *(int(scale * side) for side in together))]


def largest_shapes(data: DataConfig, sizes: np.ndarray) -> tuple[Shape, Shape]:
    """The largest padded shape of one image, and of several together: a flat one is padded below an upright one."""
    assert data.scales is not None and data.max_size is not None, "resolve the config first"
    known = (sizes > 0).all(1)
    originals = np.unique(sizes[known], axis=0).tolist()
    shapes = [resized_size(h, w, scale, data.max_size) for h, w in originals for scale in data.scales]
    scale = max(data.scales)
    longest = [] if known.all() else [data.max_size]
    if data.crop:
        longest.append(min(scale * max(CROP_SIDES) // min(CROP_SIDES), data.max_size))
    shapes += [shape for side in longest for shape in ((side, scale), (scale, side))]
    single = max(shapes, key=math.prod)
    return padded_shape([single], data.pad_multiple), padded_shape(shapes, data.pad_multiple)


def rehearse(
    cfg: Config,
    fabric: Fabric,
    model: _FabricModule,
    criterion: SetCriterion,
    optimizer: _FabricOptimizer,
    size: Size,
) -> bool:
    """Whether memory suffices for a batch of this size, beside the optimizer's moments and, where a step has several
    passes, the gradients of an earlier one. Leaves gradients behind."""
    detr, precision, device = model.module, fabric.strategy.precision, fabric.device
    trained = [p for p in detr.parameters() if p.requires_grad]
    statistics = BatchStatistics(detr)
    several = cfg.train.accumulate > 1 or cfg.data.max_batch_pixels is not None
    try:
        # empty ones in the place of what AdamW makes in its first step
        moments = [torch.empty_like(p) for p in trained if p not in optimizer.optimizer.state for _ in range(2)]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for _ in range(1 + several):
                images = torch.zeros(size.images, 3, size.height, size.width, dtype=torch.uint8, device=device)
                mask = torch.zeros(size.images, size.height, size.width, dtype=torch.bool, device=device)
                targets = fabric.to_device([full_target(cfg.model.num_queries, size)] * size.images)
                num_boxes, class_weight_sum = criterion.normalizers(targets, cfg.model.num_queries)
                inputs = precision.convert_input(tuple(normalize(ImageBatch(images, mask))))
                with precision.forward_context(), torch.compiler.set_stance("force_eager"):
                    outputs = detr(*inputs)
                criterion(precision.convert_output(outputs), targets, num_boxes, class_weight_sum).total.backward()
        del moments
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
        return False
    finally:
        statistics.restore()
    return True


def full_target(queries: int, size: Size) -> Target:
    """As many objects as an image can get, all alike."""
    shape = (size.height, size.width)
    return Target(torch.zeros(queries, dtype=torch.int64), torch.full((queries, 4), 0.5), 0, shape, shape)
