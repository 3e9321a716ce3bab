"""The kernels compile to machine code for GPUs, within what each of them has; no GPU is needed."""

from __future__ import annotations

import json

import pytest

from tests.commands import REPOSITORY, python

SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # bytes a block may have, by NVIDIA's programming guide
REGISTERS = 65536  # of a multiprocessor
SPILT = 16  # bytes a thread: a few registers that are stored once, not in a loop's every turn


@pytest.mark.process
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("which", [(), pytest.param(("all",), marks=pytest.mark.slow)], ids=["largest", "all"])
def test_kernels_compile_for_each_generation_within_its_limits(which: tuple[str, ...]) -> None:
    done = python(
        "-m", "tests.model.kernels.compile_kernels", *which, cwd=REPOSITORY, timeout=2900, TRITON_INTERPRET="0"
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == (4 * 3 * 3 * 3 if which else 4 + 2)
    assert {kernel["arch"] for kernel in kernels} == SHARED.keys()
    for kernel in kernels:
        assert kernel["cubin"] > 0 and kernel["spilt"] <= SPILT, kernel
        assert kernel["shared"] <= SHARED[kernel["arch"]], kernel
        assert kernel["registers"] * kernel["threads"] <= REGISTERS, kernel
