"""A GPU's training step where there is no GPU: the real step on the meta device, whose tensors have shapes but no
numbers, under the rules by which CUDA casts in mixed precision and computes attention and dropout in one kernel.

Two things are counted, the same on every machine: the operators that compute something (views and allocations do not),
which a GPU has to be told of one by one; and the bytes of the tensors that are alive, in the 512-byte blocks of CUDA's
allocator. What it leaves out: workspaces of cuDNN and cuBLAS, fragmentation, and the CUDA context itself.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detr_fabric.config import AttnConfig, ModelConfig, OptimConfig
from detr_fabric.data.batch import ImageBatch, Size, Target
from detr_fabric.loss.criterion import SetCriterion, forward_backward
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETROutput
from detr_fabric.model.padding import ALIGNMENT
from detr_fabric.optimizer import build_optimizer

META = torch.device("meta")
CLASSES, OBJECTS = 91, 7  # objects of an image: COCO's mean
BLOCK = 512  # bytes
aten = torch.ops.aten

LOW = {F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm}  # in bf16
FULL = {F.layer_norm, torch.softmax, Tensor.softmax, Tensor.sum, Tensor.cumsum, Tensor.pow, Tensor.rsqrt}  # in float32
FREE = {"detach", "_unsafe_view", "_reshape_alias", "lift_fresh", "alias", "is_same_size", "resize_", "empty"}
FREE |= {"empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}


class Simulated(NamedTuple):
    """One training step, the optimizer's included."""

    operators: Counter[str]  # by name
    peak: int  # bytes, with weights, gradients and AdamW's moments


class _Rules(TorchFunctionMode):
    """Under `autocast`, which stands in for torch's: bf16 for products, float32 for sums, each weight cast once."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[Tensor, Tensor] = {}
        self.enabled = False

    @contextmanager
    def autocast(self, device_type: str, dtype: object = None, enabled: bool = True) -> Iterator[None]:
        before, self.enabled = self.enabled, enabled
        yield
        self.enabled = before
        if enabled:
            self.casts.clear()

    def low(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.bfloat16()
        if x not in self.casts:
            self.casts[x] = x.bfloat16()
        return self.casts[x]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.enabled and func in LOW:
            args, kwargs = [self.low(x) for x in args], {name: self.low(x) for name, x in kwargs.items()}
        elif self.enabled and func in FULL and args[0].dtype == torch.bfloat16:
            args = [args[0].float(), *args[1:]]
        return func(*args, **kwargs)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return aten.native_dropout(x, p, True)[0] if training and p > 0 else x


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Any:
    """CUDA's kernels: flash attention, with a mask the memory-efficient one, which takes the mask as numbers."""
    if mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout)[0]
    keys = k.shape[2]
    if mask.dtype == torch.bool:
        mask = torch.where(mask, q.new_zeros(()), -torch.inf)
    if mask.stride(0) % ALIGNMENT:
        mask = F.pad(mask, (0, -keys % ALIGNMENT))[..., :keys]
    bias = mask.expand(*q.shape[:3], keys)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout)[0]


class _Device(TorchDispatchMode):
    """Counts operators and live bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        on_device = any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs)))
        if name == "_to_copy" and on_device and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape)  # the costs that the host matches by
        found = func(*args, **kwargs)
        made = [x for x in tree_leaves(found) if isinstance(x, Tensor) and x.is_meta]
        if (on_device or made) and not (func.is_view or name in FREE):
            self.operators[name] += 1
        for tensor in made:
            self.keep(tensor)
        return found

    def keep(self, tensor: Tensor) -> None:
        """Counts the tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def simulate(model: ModelConfig, attn: AttnConfig, batch: int, size: Size) -> Simulated:
    """The second training step, in bf16: forward, criterion, matching, backward, clipping and AdamW.

    model: a resolved config. batch: images, all of this size. attn.recompute unset counts as on a GPU, and as if there
    were no fused kernel.
    """
    attn = replace(attn, recompute=attn.recompute is not False)
    rules, device = _Rules(), _Device()
    with torch.device(META):
        detr = build_model(replace(model, backbone_weights="none"), attn, CLASSES)
        criterion = SetCriterion(CLASSES)
        target = Target(torch.zeros(OBJECTS, dtype=torch.int64), torch.zeros(OBJECTS, 4), 0, size, size)
        pixels = torch.zeros(batch, 3, *size, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        images = ImageBatch(pixels, torch.zeros(batch, *size, dtype=torch.bool))
        normalizers = torch.ones(2)
    detr.to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(detr, OptimConfig())
    for tensor in [*detr.state_dict().values(), *criterion.buffers(), *images]:
        device.keep(tensor)

    def forward(images: Tensor, mask: Tensor) -> DETROutput:
        with rules, rules.autocast("cuda"):
            outputs: DETROutput = detr(images.bfloat16(), mask)
        return outputs

    backward: Callable[[Tensor], None] = Tensor.backward
    with (
        patch("torch.autocast", rules.autocast),
        patch("torch.nn.functional.dropout", _dropout),
        patch("torch.nn.functional.scaled_dot_product_attention", _attention),
        patch("torch.optim.adam._device_dtype_check_for_fused", lambda *_: None),
        patch("torch.nn.utils.clip_grad._device_has_foreach_support", lambda *_: True),
        device,
    ):
        for _ in range(2):
            device.operators.clear()
            forward_backward(forward, criterion, (images, [target] * batch), normalizers, backward)
            torch.nn.utils.clip_grad_norm_(detr.parameters(), 0.1, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
    return Simulated(device.operators, device.peak)
