"""Triton's interpreter, in which kernels run on tensors of the CPU: what it lacks, and what it can tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's kernels run there")


@contextmanager
def bf16_products() -> Iterator[None]:
    """Matrix products of bfloat16, which the interpreter holds as whole numbers and would multiply as such."""
    whole = InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        def float32(x: Any) -> Any:
            return self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

        return whole(self, float32(a), float32(b), *rest)

    InterpreterBuilder.create_dot = dot
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = whole


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """How many bytes kernels load and store: every element that a mask lets through, each time anew."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    count = {"loaded": 0, "stored": 0}

    def bytes_of(pointers: Any, mask: Any) -> int:
        wide = np.broadcast_to(mask.data, pointers.data.shape)
        return int(wide.sum()) * max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count["loaded"] += bytes_of(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count["stored"] += bytes_of(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counting_load, counting_store
    try:
        yield count
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
