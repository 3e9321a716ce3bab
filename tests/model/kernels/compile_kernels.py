"""Compiles the kernels for GPUs on a machine without one: python -m tests.model.kernels.compile_kernels [all]

Prints a JSON line a kernel: shared memory (bytes), registers a thread, and bytes of registers that spill. In a process
of its own, because in pytest's Triton is in its interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from detr_fabric.model.kernels import triton_entmax
from detr_fabric.model.kernels.fused import STEPS, blocks

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
KERNELS = ("solve", "attend", "query_gradient", "key_gradient")
TYPES = {
    "allowed_ptr": "*i1",
    "seed_ptr": "*i64",
    "T": "i32",
    "S": "i32",
    "H": "i32",
    "scale": "fp32",
    "dropout": "fp32",
}
HALF = {f"{name}_ptr" for name in ("q", "k", "v", "g", "out", "dq", "dk", "dv")}  # of the inputs' dtype
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compiled(name: str, arch: int, dtype: torch.dtype, queries: int, power: int) -> dict[str, Any]:
    """One kernel as `fused` would launch it, with padding and dropout, which take the most registers."""
    kernel, use = getattr(triton_entmax, name), blocks(queries, dtype)[name]
    assert {p.name for p in kernel.params if p.do_not_specialize} == {"T", "S"}  # else each new size may compile anew
    constants = {"D": 32, "POWER": power, "MASKED": True, "DROPS": True, "LEARNED": power == 0}
    constants |= {"STEPS": STEPS, "BT": use.queries, "BS": use.keys}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        key: "constexpr" if key in constants else f"*{NAMES[dtype]}" if key in HALF else TYPES.get(key, "*fp32")
        for key in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names) if key in HALF}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    out = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": use.warps})
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(out.asm["ptx"])
        chip = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [str(PTXAS), "-v", f"--gpu-name={chip}", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilt = re.search(r"(\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spilt is not None and registers is not None, said
    found = {"kernel": name, "arch": arch, "dtype": NAMES[dtype], "queries": queries, "power": power}
    found |= {"cubin": len(out.asm["cubin"]), "shared": out.metadata.shared}
    return found | {"registers": int(registers[1]), "spilt": int(spilt[1]), "threads": 32 * use.warps}


if __name__ == "__main__":
    cases = [(name, 86, torch.bfloat16, 1050, 0) for name in KERNELS]  # which has the least shared memory
    cases += [("attend", arch, torch.bfloat16, 1050, 0) for arch in (80, 90)]
    if "all" in sys.argv[1:]:
        sizes = ((torch.bfloat16, 1050), (torch.bfloat16, 100), (torch.float32, 1050))
        cases = [
            (name, arch, *size, power)
            for name in KERNELS
            for arch in (80, 86, 90)
            for size in sizes
            for power in (0, 1, 2)
        ]
    for case in cases:
        print(json.dumps(compiled(*case)), flush=True)
