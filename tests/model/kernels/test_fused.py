"""The fused kernels, in Triton's interpreter, against the plain computation that they replace."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detr_fabric.config import AttnConfig, Mapping
from detr_fabric.model import kernels
from detr_fabric.model.attention import Attention
from detr_fabric.model.kernels import agreement, fused
from detr_fabric.model.kernels.agreement import differences, fused_alpha, plain_attention, try_kernels
from detr_fabric.model.kernels.fused import entmax_attention
from tests.model.kernels.interpreted import bf16_products, counted_bytes, interpreter

pytestmark = interpreter
CPU = torch.device("cpu")
EXACT, OF_ALPHA = 2e-6, 1e-5  # alpha's gradient is a sum over all weights of a head


class Case(NamedTuple):
    """What attention is computed of."""

    images: int
    heads: int
    queries: int
    keys: int
    width: int
    alpha: float | tuple[float, float]  # a pair: learned by two heads
    scale: float  # of the scores' spread
    masked: str  # nothing, at the end, anywhere, or everything in the last image
    ties: bool
    seed: int


def cases(queries: int, keys: int) -> st.SearchStrategy[Case]:
    """Cases of up to so many queries and keys."""
    learned = st.tuples(st.floats(1.01, 1.99), st.floats(1.0001, 2.0))
    return st.builds(
        lambda alpha, *rest: Case(rest[0], 2 if isinstance(alpha, tuple) else 1, *rest[1:4], alpha, *rest[4:]),
        st.one_of(st.sampled_from([2.0, 1.5, 1.25, 1.75, 1.0, 1.001]), learned),
        st.integers(1, 2),
        st.integers(1, queries),
        st.integers(1, keys),
        st.sampled_from([16, 32]),
        st.sampled_from([0.05, 0.5, 2.0]),
        st.sampled_from(["nothing", "end", "anywhere", "everything"]),
        st.booleans(),
        st.integers(0, 1000),
    )


def check(case: Case) -> None:
    """Against float64, to EXACT of the largest of the numbers, the inputs and 1: every number of the output, and the
    root mean square of gradients, because (3) is infinitely steep at the edge of the support for alpha between 1.5 and
    2. Where scores are so large that float32 does not reach it, to five times the plain computation's error."""
    generator = torch.Generator().manual_seed(case.seed)
    shapes = [(case.images, case.heads, n, case.width) for n in (case.queries, case.keys, case.keys, case.queries)]
    q, k, v, g = (torch.randn(shape, generator=generator) for shape in shapes)
    q *= case.scale
    if case.ties:
        k = k[:, :, torch.randint(case.keys, (case.keys,), generator=generator) // 2]
    allowed = None
    if case.masked != "nothing":
        allowed = torch.rand(case.images, case.keys, generator=generator) < 0.7
        if case.masked == "end":
            allowed[:] = torch.arange(case.keys) < max(1, case.keys * 2 // 3)
        if case.masked == "everything":
            allowed[-1] = False
    alpha = torch.tensor(case.alpha) if isinstance(case.alpha, tuple) else case.alpha
    inputs: list[Tensor] = [q, k, v, *([alpha] if isinstance(alpha, Tensor) else [])]
    found = with_gradients(entmax_attention, inputs, g, allowed, alpha)
    plain = with_gradients(plain_attention, inputs, g, allowed, alpha)
    exact = with_gradients(plain_attention, [x.double() for x in inputs], g.double(), allowed, alpha)
    for number, (a, b, c) in enumerate(zip(found, plain, exact, strict=True)):
        error, of_plain = (x - c if number == 0 else (x - c).norm() / c.numel() ** 0.5 for x in (a, b))
        limit = max(1.0, *(float(x.abs().max()) for x in (c, q, k, v, g))) * (OF_ALPHA if number == 4 else EXACT)
        assert error.abs().max() <= max(limit, 5 * of_plain.abs().max()), case
    if case.masked == "everything":
        assert not any(x[-1].any() for x in found[:4])


def with_gradients(
    attention: Any, inputs: list[Tensor], g: Tensor, allowed: Tensor | None, alpha: Any
) -> tuple[Tensor, ...]:
    """Output and the gradient of each input; the fourth of these is alpha where it is learned."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attention(*leaves[:3], allowed, leaves[3] if len(leaves) > 3 else alpha)
    return out.detach(), *torch.autograd.grad(out, leaves, g)


few = settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
many = settings(max_examples=200, deadline=None, derandomize=True, phases=[Phase.generate])


@pytest.mark.process
@few
@given(cases(queries=20, keys=40))
def test_output_and_gradients_are_those_of_the_plain_computation(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@many
@given(st.one_of(cases(queries=70, keys=70), cases(queries=33, keys=130), cases(queries=2, keys=1100)))
def test_output_and_gradients_are_those_of_the_plain_computation_at_any_length(case: Case) -> None:
    check(case)


@pytest.mark.process
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 0.03), pytest.param(torch.float16, 4e-3, marks=pytest.mark.slow)],
    ids=str,
)
def test_half_precision_errs_by_its_rounding(dtype: torch.dtype, tolerance: float) -> None:
    with bf16_products():
        assert max(differences(torch.tensor([1.3]), CPU, dtype, 16, heads=1)) < tolerance


def test_dropout_is_seeded_and_halves_or_doubles_each_weight() -> None:
    q, k, _ = torch.randn(3, 1, 1, 16, 16)
    v = torch.eye(16).expand(1, 1, 16, 16)  # so that the output is the weights
    whole = entmax_attention(q, k, v, None, 1.5)
    out = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out.append(entmax_attention(q, k, v, None, 1.5, 0.5))
    torch.testing.assert_close(out[0], 2 * whole * (out[0] > 0))
    assert 0.3 < (out[0] > 0).sum() / (whole > 0).sum() < 0.7
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def test_no_matrix_of_weights_is_ever_in_memory() -> None:
    tokens, width = 70, 16
    q, k, v = (torch.randn(1, 1, tokens, width, requires_grad=True) for _ in range(3))
    with Largest() as seen:
        entmax_attention(q, k, v, None, 1.5, 0.1).sum().backward()
    assert 0 < seen.most <= 4 * tokens * width < tokens * tokens  # the interpreter copies q, k and v as bytes


# ---- what uses the kernels


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device has tried the kernels yet."""
    monkeypatch.setattr(agreement, "_agreed", set())


def block(mapping: Mapping, dropout: float = 0.0) -> Attention:
    torch.manual_seed(1)
    return Attention(32, 2, AttnConfig(mapping, alpha=1.3), dropout=dropout)


@pytest.mark.parametrize("mapping", ["sparsemax", "entmax-learned", "softmax", "relu"])
def test_an_attention_block_computes_the_same_by_the_kernels_where_they_agreed(
    mapping: Mapping, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = block(mapping)
    query, key = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 9, 32, requires_grad=True)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 4:] = padding[1] = True
    everything = [query, key, *(p for p in module.parameters())]

    def computed() -> tuple[Tensor, ...]:
        out = module(query, key, key, padding)
        return out, *torch.autograd.grad(out.square().sum(), everything)

    plain = computed()
    agreement._agreed.add((CPU, torch.float32, 16))
    calls: list[bool] = []
    whole = agreement.fused_alpha
    monkeypatch.setattr("detr_fabric.model.attention.fused_alpha", lambda *a: calls.append(True) or whole(*a))
    for a, b in zip(plain, computed(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert calls and (whole(mapping, module.attn, module.learned()) is not None) == (mapping in agreement.FUSED)


def test_values_may_be_narrower_than_queries_and_keys() -> None:
    """As in conditional cross-attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, 2, n, width, generator=generator) for n, width in ((5, 32), (9, 32), (9, 16), (5, 16)))
    allowed = torch.arange(9)[None] < 6
    results = []
    for attention in (kernels.entmax_attention, plain_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, allowed, 1.5, *([0.0] if attention is kernels.entmax_attention else []))
        results.append([out, *torch.autograd.grad(out, inputs, g)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def test_which_alphas_the_kernels_compute() -> None:
    learned = {"alpha": torch.tensor([1.5])}
    assert fused_alpha("entmax", AttnConfig(alpha=2.5), learned) is None
    assert fused_alpha("entmax", AttnConfig(alpha=1.2), learned) == 1.2
    assert fused_alpha("entmax-learned", AttnConfig(alpha_range=(1.0, 3.0)), learned) is None
    assert fused_alpha("entmax-learned", AttnConfig(), learned) is learned["alpha"]
    assert fused_alpha("topk", AttnConfig(), {}) is None


def test_agreement_is_said_and_remembered(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(agreement, "differences", lambda *args: tried.append(args[0]) or iter([1e-7, 3e-7]))
    (line,) = try_kernels(AttnConfig("sparsemax"), CPU, "32-true", 16)
    agrees = r"which agrees with the plain computation on cpu to 3e-07 \(\d+\.\d s\)"
    assert re.fullmatch(f"attn    fused kernel for heads 16 wide, {agrees}", line), line
    assert tried == [2.0]  # once for all of the model's blocks
    q = torch.zeros(1, 1, 1, 16)
    assert agreement.agreed(q) and not agreement.agreed(q.bfloat16()) and not agreement.agreed(q[..., :8])


@pytest.mark.parametrize("wrong", ["sum", "gradient"])
def test_a_kernel_that_errs_does_not_agree(wrong: str, untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * (1.01 if wrong == "sum" else 1)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * (1.01 if wrong == "gradient" else 1)

    def kernel(q: Tensor, k: Tensor, v: Tensor, allowed: Any, alpha: Any, dropout: float = 0.0) -> Tensor:
        return Doubled.apply(plain_attention(q, k, v, allowed, alpha))

    monkeypatch.setattr(fused, "entmax_attention", kernel)
    (line,) = try_kernels(AttnConfig("sparsemax"), CPU, "32-true", 16)
    assert "no fused kernel, for it differs by" in line and not agreement._agreed


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda: iter([1e-7, 0.5]), "differs by 5e-01 from the plain computation"),
        (lambda: iter([float("nan"), 1e-7]), "differs by nan"),
        (lambda: iter([1e-7, float("nan")]), "differs by nan"),
        (lambda: 1 / 0, "does not run here: ZeroDivisionError: division by zero"),
    ],
    ids=["wrong", "NaN first", "NaN last", "crash"],
)
def test_without_agreement_one_sentence_says_so_and_the_plain_computation_is_used(
    untried: None, monkeypatch: pytest.MonkeyPatch, found: Any, words: str
) -> None:
    monkeypatch.setattr(agreement, "differences", lambda *args: found())
    (line,) = try_kernels(AttnConfig("entmax15"), CPU, "32-true", 16)
    assert words in line and "no fused kernel" in line and not agreement._agreed


def test_nothing_is_tried_where_no_kernel_is_wanted_or_none_fits(untried: None) -> None:
    assert try_kernels(AttnConfig("softmax"), CPU, "32-true", 32) == []
    assert try_kernels(replace(AttnConfig("sparsemax"), fused=False), CPU, "32-true", 32) == []
    assert "heads are 24 wide" in try_kernels(AttnConfig("sparsemax"), CPU, "32-true", 24)[0]


# ---- what the kernels move


@pytest.mark.slow
@pytest.mark.parametrize("mapping, alpha", [("sparsemax", 2.0), ("entmax15", 1.5)])
def test_bytes_moved_are_at_most_twice_those_of_flash_attention(mapping: str, alpha: float) -> None:
    """Of one head at 1,050 tokens, 32 wide, in half precision: every load and store of forward and backward, counted by
    the interpreter. B 4 and 8 heads are 32 times as many, as are FlashAttention-2's."""
    tokens, width = 1050, 32
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, width).half().requires_grad_() for _ in range(3))
    with counted_bytes() as count:
        entmax_attention(q, k, v, None, alpha).sum().backward()
    moved = count["loaded"] + count["stored"]
    print(f"{mapping}: {moved / 1e6:.2f} MB a head, {moved / flash_bytes(tokens, width):.2f} times flash attention's")
    assert moved <= 2 * flash_bytes(tokens, width)


def flash_bytes(tokens: int, width: int) -> int:
    """What FlashAttention-2 loads and stores for a head, T = S, in half precision; its tiles are 128 x 128 at this
    width. An atomic addition counts as one store.

    Forward: q once, k and v for every tile of queries; out and a float32 a row. Backward: out and its gradient for the
    row sums; a cleared float32 dq; k and v once, q, the gradient and two floats a row for every tile of keys, which
    adds to the float32 dq; dk and dv; dq read in float32 and written.
    """
    matrix, row, tiles = 2 * tokens * width, 4 * tokens, -(-tokens // 128)
    forward = matrix + tiles * 2 * matrix + matrix + row
    backward = 2 * matrix + row + 2 * matrix + 2 * matrix + tiles * (2 * matrix + 2 * row + 2 * matrix) + 2 * matrix
    return forward + backward + 2 * matrix + matrix
