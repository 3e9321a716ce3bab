"""Mappings against slow float64 references, the entmax package, finite differences and the compiler."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detr_fabric.model import mappings
from detr_fabric.model.entmax import BLOCK_SCORES, entmax, entmax15, softmax, sparsemax
from tests.model.score_rows import rows

ENTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "entmax 1.3": lambda scores: entmax(scores, 1.3),
    "entmax 1.8": lambda scores: entmax(scores, 1.8),
}
EVERY = ENTMAX | {
    "sigmoid": mappings.sigmoid,
    "relu": mappings.relu,
    "softmax1": mappings.softmax1,
    "topk": lambda scores: mappings.topk(scores, 3),
}
each = pytest.mark.parametrize("mapping", EVERY.values(), ids=EVERY)
each_entmax = pytest.mark.parametrize("mapping", ENTMAX.values(), ids=ENTMAX)


def by_sorting(row: Tensor, alpha: float) -> Tensor:
    """sparsemax (Martins & Astudillo 2016, algorithm 1) and entmax15 (Peters et al. 2019, algorithm 2) of one row."""
    z = (row.double() - row.double().max()) * (alpha - 1)
    ordered = z.sort(descending=True).values
    ordered = ordered[ordered > -math.inf]
    size = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    if alpha == 2:
        tau = (ordered.cumsum(0) - 1) / size
    else:
        mean = ordered.cumsum(0) / size
        spread = (ordered.square().cumsum(0) / size - mean.square()) * size
        tau = mean - ((1 - spread).clamp_min(0) / size).sqrt()
    support = int((tau <= ordered).sum())
    return (z - tau[support - 1]).clamp_min(0) ** (1 / (alpha - 1))


def by_bisection(row: Tensor, alpha: float) -> Tensor:
    """entmax of one row: halves the interval of lam, from where one key makes the sum 1 to where equal keys do."""
    x, e = row.double() - row.double().max(), alpha - 1
    if e == 0:
        return x.softmax(0)

    def weights(lam: float) -> Tensor:
        return torch.exp(torch.log1p((e * (x - lam)).clamp_min(-1)) / e)

    low, high = 0.0, -math.expm1(-e * math.log(len(row))) / e
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if weights(middle).sum() >= 1 else (low, middle)
    return weights(low) / weights(low).sum()


def reference(row: Tensor, alpha: float) -> Tensor:
    if row.isneginf().all():
        return torch.zeros_like(row, dtype=torch.float64)
    return by_sorting(row, alpha) if alpha in (1.5, 2.0) else by_bisection(row, alpha)


@pytest.mark.process
@settings(max_examples=1200, deadline=None, derandomize=True, database=None)
@given(
    rows(12, 4000),
    st.one_of(st.sampled_from([1.0, 1.5, 2.0]), st.floats(1, 2, width=32), st.floats(1, 1.0078125, width=32)),
    st.booleans(),
)
def test_entmax_is_within_1e_6_of_the_float64_reference(row: Tensor, alpha: float, as_tensor: bool) -> None:
    weights = entmax(row, torch.tensor([alpha]) if as_tensor else alpha)
    assert weights.dtype == torch.float32
    assert (weights - reference(row, alpha)).abs().max() <= 1e-6
    assert abs(weights.double().sum() - (0 if row.isneginf().all() else 1)) <= 1e-5
    assert (weights[row.isneginf()] == 0).all() and (weights >= 0).all()


def test_the_references_agree_with_each_other() -> None:
    torch.manual_seed(0)
    for n in (1, 2, 50, 1000):
        row = torch.randn(n)
        for alpha in (1.5, 2.0):
            torch.testing.assert_close(by_sorting(row, alpha), by_bisection(row, alpha), atol=1e-12, rtol=0)


def slow_rows() -> Tensor:
    """(R, 4000) rows that need many Newton steps: clusters in geometric progression, and dense normal ones."""
    torch.manual_seed(0)
    result = [0.1 * torch.randn(4000), torch.randn(4000), -(torch.rand(4000) ** 4)]
    for ratio, width in ((0.55, 0.001), (0.6, 0.01), (0.7, 0.2)):
        step = (1 - ratio) / ratio
        cluster = (torch.rand(4000).log() / math.log(ratio)).floor()  # cluster j holds a share (1 - ratio) ratio^j
        row = -1 + width * (1 - step**cluster) / (1 - step)
        row[0] = 0
        result.append(row)
    return torch.stack(result)


@pytest.mark.parametrize("alpha", [1.5, 1.75, 2.0])
def test_a_fixed_number_of_steps_suffices_for_slow_rows(alpha: float) -> None:
    compiled = torch.compile(entmax, backend="aot_eager", fullgraph=True)
    for row, weights in zip(slow_rows(), compiled(slow_rows(), alpha), strict=True):
        torch.testing.assert_close(weights.double(), reference(row, alpha), atol=1e-6, rtol=0)


@each
def test_permuted_scores_give_permuted_weights(mapping: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    scores, order = torch.randn(20, 30), torch.randperm(30)
    torch.testing.assert_close(mapping(scores[:, order]), mapping(scores)[:, order], atol=1e-6, rtol=0)


@each_entmax
def test_a_common_shift_of_scores_changes_nothing(mapping: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    scores = (torch.randn(20, 30) * 64).round() / 64  # so that the sum with an integer is exact
    torch.testing.assert_close(mapping(scores + 1000), mapping(scores), atol=0, rtol=0)


def test_entmax_reaches_its_limits() -> None:
    torch.manual_seed(0)
    scores = 3 * torch.randn(50, 40)
    torch.testing.assert_close(softmax(scores), scores.softmax(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(entmax(scores, 1 + 1e-6), scores.softmax(-1), atol=1e-5, rtol=0)
    assert torch.equal(entmax(scores, 1.0), softmax(scores))
    assert torch.equal(entmax(scores, 1.5), entmax15(scores))
    assert torch.equal(entmax(scores, 2.0), sparsemax(scores))
    torch.testing.assert_close(entmax(scores, 2 - 1e-6), sparsemax(scores), atol=1e-5, rtol=0)
    for alpha in (1.0, 1.5, 2.0):  # as a tensor all alphas take the general way
        torch.testing.assert_close(entmax(scores, torch.tensor(alpha)), entmax(scores, alpha), atol=1e-6, rtol=0)


def test_alpha_broadcasts_one_a_row_and_gets_the_sum_of_its_rows_gradients() -> None:
    torch.manual_seed(0)
    scores, g = torch.randn(2, 2, 3, 20), torch.randn(2, 2, 3, 20)
    alpha = torch.tensor([1.2, 1.9])[:, None, None].requires_grad_()
    weights = entmax(scores, alpha)
    (gradient,) = torch.autograd.grad(weights, alpha, g)
    for head in range(2):
        own = alpha[head].detach().requires_grad_()
        expected = entmax(scores[:, head], own)
        torch.testing.assert_close(weights[:, head], expected)
        torch.testing.assert_close(gradient[head], torch.autograd.grad(expected, own, g[:, head])[0])


@each
def test_a_row_that_forbids_every_key_is_0_and_passes_no_gradient(mapping: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 6)
    scores[0] = -math.inf
    scores[1, :3] = -math.inf
    scores.requires_grad_()
    weights = mapping(scores)
    (gradient,) = torch.autograd.grad(weights, scores, torch.randn(4, 6))
    assert (weights[0] == 0).all() and (gradient[0] == 0).all()
    assert (weights[1, :3] == 0).all() and (gradient[1, :3] == 0).all()
    assert weights.isfinite().all() and gradient.isfinite().all() and gradient[2:].any()


def test_a_row_that_forbids_every_key_gives_alpha_a_finite_gradient() -> None:
    scores = torch.tensor([[-math.inf] * 4, [1.0, 0.5, 0.0, -math.inf]])
    alpha = torch.tensor([[1.5], [1.5]], requires_grad=True)
    (gradient,) = torch.autograd.grad(entmax(scores, alpha), alpha, torch.randn(2, 4))
    assert gradient[0] == 0 and gradient[1] != 0 and gradient.isfinite().all()


@each
def test_first_and_second_derivatives_in_float64(mapping: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(3)
    scores = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    forbidden = torch.zeros(3, 7, dtype=torch.bool)
    forbidden[0, 2] = True

    def masked(x: Tensor) -> Tensor:
        return mapping(x.masked_fill(forbidden, -math.inf))

    assert masked(scores).dtype == torch.float64
    assert torch.autograd.gradcheck(masked, (scores,))
    assert torch.autograd.gradgradcheck(masked, (scores,))


@pytest.mark.parametrize("alpha", [1.001, 1.05, 1.3, 1.5, 1.9])
def test_first_and_second_derivatives_in_alpha_too(alpha: float) -> None:
    torch.manual_seed(1)
    scores = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    alphas = torch.full((3, 1), alpha, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entmax, (scores, alphas))
    assert torch.autograd.gradgradcheck(entmax, (scores, alphas))


@pytest.mark.parametrize("alpha", [0.25, 0.7, 0.99, 1.0001, 1.001, 1.01, 1.1, 1.5, 1.9])
def test_the_gradient_of_alpha_is_exact_in_float32_and_near_1(alpha: float) -> None:
    torch.manual_seed(0)
    row, g = torch.randn(200), torch.randn(200)
    parameter = torch.tensor([alpha], requires_grad=True)
    (gradient,) = torch.autograd.grad(entmax(row, parameter), parameter, g)
    exact, h = parameter.item(), 1e-5
    difference = (by_bisection(row, exact + h) - by_bisection(row, exact - h)) / (2 * h)
    torch.testing.assert_close(gradient.double(), (difference * g).sum()[None], atol=2e-6, rtol=1e-5)


def test_agrees_with_the_entmax_package() -> None:
    package = pytest.importorskip("entmax")
    torch.manual_seed(0)
    scores = torch.randn(64, 50, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(64, 50, dtype=torch.float64)
    pairs = [
        (sparsemax(scores), package.sparsemax(scores), [scores]),
        (entmax15(scores), package.entmax15(scores), [scores]),
        (entmax(scores, 1.25), package.entmax_bisect(scores, 1.25), [scores]),
        (entmax(scores, alpha), package.entmax_bisect(scores, alpha), [scores, alpha]),
    ]
    for ours, theirs, inputs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
        for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g), strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


def check_compiled(mapping: Callable[[Tensor], Tensor], backend: str) -> None:
    torch.manual_seed(0)
    scores, g = torch.randn(2, 5, 40), torch.randn(2, 5, 40)
    scores[0, 1, 7:] = -math.inf
    scores[1, 2] = -math.inf
    scores.requires_grad_()
    expected = mapping(scores)
    weights = torch.compile(mapping, backend=backend, fullgraph=True)(scores)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    gradients = (torch.autograd.grad(w, scores, g)[0] for w in (weights, expected))
    torch.testing.assert_close(*gradients, atol=3e-6, rtol=1e-4)


@pytest.mark.process
@each
def test_compiles_into_one_graph(mapping: Callable[[Tensor], Tensor]) -> None:
    check_compiled(mapping, "aot_eager")


@pytest.mark.process
@pytest.mark.slow
@each
def test_compiles_with_inductor(mapping: Callable[[Tensor], Tensor]) -> None:
    check_compiled(mapping, "inductor")


@pytest.mark.process
@pytest.mark.slow
def test_entmax_with_a_learned_alpha_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    scores, g = torch.randn(2, 4, 5, 40, requires_grad=True), torch.randn(2, 4, 5, 40)
    alpha = torch.tensor([1.01, 1.3, 1.6, 1.99])[:, None, None].requires_grad_()
    expected = torch.autograd.grad(entmax(scores, alpha), (scores, alpha), g)
    compiled = torch.compile(entmax, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(scores, alpha), (scores, alpha), g), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_only_rounds_what_float32_computes(
    mapping: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    scores, g = (2 * torch.randn(8, 500)).to(dtype).requires_grad_(), torch.randn(8, 500).to(dtype)
    weights = mapping(scores)
    (gradient,) = torch.autograd.grad(weights, scores, g)
    assert weights.dtype == gradient.dtype == dtype
    exact = scores.detach().float().requires_grad_()
    assert torch.equal(weights, mapping(exact).to(dtype))
    (exact_gradient,) = torch.autograd.grad(mapping(exact), exact, g.float())
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.float(), exact_gradient, atol=2 * rounding, rtol=2 * rounding)


def test_blocks_of_rows_give_what_single_rows_give() -> None:
    torch.manual_seed(0)
    scores = torch.randn(300, 3, 700).transpose(0, 1).requires_grad_()  # three blocks, not contiguous
    alpha = torch.tensor([1.1, 1.5, 1.9])[:, None, None].requires_grad_()
    g = torch.randn(3, 300, 700)
    assert scores.numel() > 2 * BLOCK_SCORES
    weights = entmax(scores, alpha)
    for head in range(3):
        torch.testing.assert_close(weights[head, 290], entmax(scores[head, 290], alpha[head, 0]))
    blocks = torch.autograd.grad(weights, (scores, alpha), g, retain_graph=True)
    whole = torch.autograd.grad(weights, (scores, alpha), g, create_graph=True)  # its graph needs all rows at once
    for a, b in zip(blocks, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@each_entmax
def test_only_the_weights_are_kept_for_the_backward_pass(mapping: Callable[[Tensor], Tensor]) -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        weights = mapping(torch.randn(4, 9, requires_grad=True))
    assert [x.data_ptr() for x in kept] == [weights.data_ptr()]


def test_the_mappings_that_are_no_entmax() -> None:
    row = torch.tensor([2.0, -1.0, -math.inf, 0.5, 0.0])
    e = torch.exp(row)
    expected = {
        "sigmoid": 1 / (1 + 4 * torch.exp(-row)),
        "relu": torch.tensor([0.8, 0.0, 0.0, 0.2, 0.0]),
        "softmax1": e / (1 + e.sum()),
        "topk": torch.tensor([e[0], 0, 0, e[3], e[4]]) / (e[0] + e[3] + e[4]),
    }
    for name, weights in expected.items():
        torch.testing.assert_close(EVERY[name](row), weights, atol=1e-6, rtol=0)
    alone = torch.tensor([-math.inf, 0.3])
    torch.testing.assert_close(mappings.sigmoid(alone), alone.sigmoid())  # one key: x - log 1
    assert (mappings.relu(-row.abs()) == 0).all()
    torch.testing.assert_close(mappings.relu(torch.tensor([0.1, 0.3])), torch.tensor([0.25, 0.75]))  # below 1 in all
    torch.testing.assert_close(mappings.topk(row, 100), row.softmax(-1))
    torch.testing.assert_close(mappings.topk(torch.zeros(5), 2), torch.full((5,), 0.2))


@pytest.mark.parametrize("alpha", [0.19, 4.01, math.nan])
def test_a_number_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha is"):
        entmax(torch.zeros(3), alpha)
