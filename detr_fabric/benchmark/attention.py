"""Attention measured, forward and backward: ours beside explicit softmax, PyTorch's kernel and the entmax package.

`ratio` is to explicit softmax attention, eager (of whole layers: to ours with softmax): 2 means twice its time.

What is timed is the attention of projected heads, queries (B, 8, T, 32) to keys and values (B, 8, S, 32) under a
padding mask, without the linear layers around it: they are the same for all and would hide differences. On a GPU q, k
and v are bfloat16, as under autocast; whole encoder layers are timed too, and the fused kernels if they agree there.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from detr_fabric.benchmark.measure import Call, PartResult, Row, measuring_clock, synchronize
from detr_fabric.config import AttnConfig, Mapping, ModelConfig
from detr_fabric.model.attention import Attention
from detr_fabric.model.kernels import agreed, try_kernels
from detr_fabric.model.kernels.agreement import FUSED
from detr_fabric.model.mappings import is_learned_by_a_mapping
from detr_fabric.model.transformer import EncoderLayer

WIDTH, HEADS = 256, 8
SHAPES = {  # queries and keys: the 25 x 38 tokens of an 800 x 1216 image, 100 object queries, and a long image
    "encoder 950x950": (950, 950),
    "cross 100x950": (100, 950),
    "self 100x100": (100, 100),
    "encoder 1400x1400": (1400, 1400),
}
OURS: dict[str, tuple[Mapping, float]] = {
    "softmax": ("softmax", 1.5),
    "sparsemax": ("sparsemax", 1.5),
    "entmax15": ("entmax15", 1.5),
    "entmax 1.25": ("entmax", 1.25),
    "entmax learned": ("entmax-learned", 1.5),
}
COMPILED = 64  # most versions of one function that torch may compile
BASES = ("explicit softmax", "layer: softmax")


def _explicit(mapping: Callable[[Tensor], Tensor], padding: Tensor) -> Callable[..., Tensor]:
    """The textbook's attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return mapping(scores.float().masked_fill(padding[:, None, None, :], -math.inf)).to(v.dtype) @ v

    return attend


def _ours(mapping: Mapping, alpha: float, fused: bool, padding: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    module = Attention(WIDTH, HEADS, AttnConfig(mapping, alpha=alpha, fused=fused)).to(padding.device)
    learned: list[Tensor] = [value for name, value in module.named_parameters() if is_learned_by_a_mapping(name)]
    return lambda q, k, v: module.attend(q, k, v, padding), learned


def _contenders(padding: Tensor, kernels: bool) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Functions of q, k and v with the parameters that they learn. padding: (B, S) bool. kernels: whether fused ones
    agree here."""
    allowed = ~padding[:, None, None, :]
    every: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "explicit softmax": (_explicit(lambda scores: scores.softmax(-1), padding), []),
        "SDPA": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, allowed), []),
    }
    for name, (mapping, alpha) in OURS.items():
        every[f"ours: {name}"] = _ours(mapping, alpha, False, padding)
        if kernels and mapping in FUSED:
            every[f"fused: {name}"] = _ours(mapping, alpha, True, padding)
    if importlib.util.find_spec("entmax"):
        import entmax

        every["package: sparsemax"] = (_explicit(entmax.sparsemax, padding), [])
        every["package: entmax15"] = (_explicit(entmax.entmax15, padding), [])
        every["package: entmax 1.25"] = (_explicit(lambda x: entmax.entmax_bisect(x, 1.25), padding), [])
    return every


def _attention_calls(queries: int, keys: int, device: torch.device, compiled: bool) -> dict[str, Call]:
    """By name, one forward and backward pass."""
    batch, dtype = (2, torch.float32) if device.type == "cpu" else (8, torch.bfloat16)
    torch.manual_seed(0)
    padding = torch.zeros(batch, keys, dtype=torch.bool, device=device)
    padding[-1, int(0.8 * keys) :] = True
    q, k, v = (
        torch.randn(batch, tokens, HEADS, WIDTH // HEADS, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for tokens in (queries, keys, keys)
    )
    g = torch.randn_like(q)

    def call(attend: Callable[..., Tensor], learned: list[Tensor]) -> Call:
        if compiled:
            attend = torch.compile(attend, fullgraph=True, dynamic=False)
        return lambda: torch.autograd.grad(attend(q, k, v), [q, k, v, *learned], g)

    every = _contenders(padding, kernels=not compiled and agreed(q))
    return {n: call(*c) for n, c in every.items() if not (compiled and n.startswith("package"))}


def _layer_calls(tokens: int, device: torch.device, compiled: bool) -> dict[str, Call]:
    """By mapping, one forward and backward pass of a whole encoder layer in training, dropout 0.1, under autocast."""
    torch.manual_seed(0)
    src, pos = torch.randn(2, 8, tokens, WIDTH, device=device)
    padding = torch.zeros(8, tokens, dtype=torch.bool, device=device)
    padding[-1, int(0.8 * tokens) :] = True

    def call(mapping: Mapping, alpha: float, fused: bool = False) -> Call:
        layer = EncoderLayer(ModelConfig(), AttnConfig(mapping, alpha=alpha, fused=fused)).to(device)
        forward = torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                out = forward(src, padding, pos)
            torch.autograd.grad(out.float().sum(), list(layer.parameters()))

        return step

    calls = {f"layer: {name}": call(*arguments) for name, arguments in OURS.items()}
    if not compiled and agreed(torch.empty(1, 1, 1, WIDTH // HEADS, device=device, dtype=torch.bfloat16)):
        calls |= {f"layer, fused: {name}": call(*of, True) for name, of in OURS.items() if of[0] in FUSED}
    return calls


def _best_ms(calls: dict[str, Call], device: torch.device, seconds: float) -> dict[str, float]:
    """Shortest time of each call. They take turns, so that a busy moment of the machine meets all of them."""

    clock = measuring_clock(device)

    def once(call: Call) -> float:
        start = clock()
        call()
        synchronize(device)
        return clock() - start

    for call in calls.values():  # compiles, and warms up
        once(call)
    best = {name: once(call) for name, call in calls.items()}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            if best[name] < seconds / 5:
                best[name] = min(best[name], once(call))
    return {name: 1e3 * value for name, value in best.items()}


def _peak_mb(call: Call, device: torch.device) -> float:
    """Most memory (MB) that a call holds at a time beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return float(max(itertools.accumulate(change for _, change in changes))) / 1e6


def measure(device: torch.device, quick: bool, seconds: float = 5.0, shapes: Sequence[str] = ()) -> PartResult:
    """One row for each shape, contender, and eager or compiled.

    quick: eager only and without the longest shape. seconds: spent on repeats at each shape. shapes:
    names of SHAPES; none: all of them.
    """
    found: list[Row] = []
    if device.type == "cuda":
        print(*try_kernels(AttnConfig("entmax-learned", "sparsemax", "entmax15"), device, "bf16-mixed", WIDTH // HEADS))
    missing = [] if importlib.util.find_spec("entmax") else ["entmax"]
    for compiled in (False,) if quick else (False, True):
        sites: dict[str, dict[str, Call]] = {}
        for shape, (queries, keys) in ((shape, SHAPES[shape]) for shape in shapes or SHAPES):
            if not quick or keys <= 950:
                sites[shape] = _attention_calls(queries, keys, device, compiled)
        if device.type == "cuda":
            sites["encoder layer, 950 tokens"] = _layer_calls(950, device, compiled)
        for shape, calls in sites.items():
            # All mappings are compiled from one function; with every shape, they exceed torch's limit of recompilation.
            torch._dynamo.reset()
            with torch._dynamo.config.patch(recompile_limit=COMPILED):
                for name, ms in _best_ms(calls, device, seconds).items():
                    peak = _peak_mb(calls[name], device)
                    found.append({"case": shape, "name": name + ", compiled" * compiled, "ms": ms, "peak_mb": peak})
    base = {row["case"]: row["ms"] for row in found if row["name"] in BASES}
    return PartResult([row | {"ratio": row["ms"] / base[row["case"]]} for row in found], missing)
