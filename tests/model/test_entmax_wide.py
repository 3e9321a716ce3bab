"""entmax for every alpha from 0.2 to 4, as a number and as a tensor, against a slow float64 bisection."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detr_fabric.config import ALPHAS, AttnConfig
from detr_fabric.model.attention import Attention
from detr_fabric.model.entmax import entmax, entmax_up_to
from tests.model.score_rows import rows
from tests.patching import Patch

SEVERAL = [0.2, 0.5, 0.9, 1.0, 1.1, 1.5, 1.9, 2.0, 2.1, 2.5, 3.0, 4.0]
each_alpha = pytest.mark.parametrize("alpha", SEVERAL)


def by_bisection(row: Tensor, alpha: float) -> Tensor:
    """entmax of one row: halves the interval of the largest key's weight m, p = [m^e + e x]_+^(1/e)."""
    if row.isneginf().all():
        return torch.zeros_like(row, dtype=torch.float64)
    x, e = row.double() - row.double().max(), alpha - 1
    if abs(e) < 1e-9:
        return x.softmax(0)

    def weights(m: float) -> Tensor:
        # expm1 and log1p, because m^e is near 1 where e is near 0
        p = torch.exp(torch.log1p((math.expm1(e * math.log(m)) + e * x).clamp_min(-1)) / e)
        return p.masked_fill(row.isneginf(), 0.0)

    low, high = 1 / len(row), 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if weights(middle).sum() <= 1 else (low, middle)
    return weights(high) / weights(high).sum()


def tolerance(alpha: float) -> float:
    """Beyond 2 the power 1/(alpha - 1) magnifies float64's rounding of a weight near 0, in the reference too."""
    return 1e-6 if alpha <= 2 else 1e-6 + 4 * (2.0**-52) ** (1 / (alpha - 1))


@pytest.mark.process
@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(
    rows(6, 300),
    st.one_of(st.sampled_from(SEVERAL), st.floats(0.25, 4, width=32), st.floats(0.984375, 1.015625, width=32)),
)
def test_every_alpha_matches_the_float64_bisection_as_a_number_and_as_a_tensor(row: Tensor, alpha: float) -> None:
    for weights in (entmax(row, alpha), entmax(row, torch.tensor([alpha], dtype=torch.float64))):
        assert weights.dtype == torch.float32
        assert (weights - by_bisection(row, alpha)).abs().max() <= tolerance(alpha)
        assert abs(weights.double().sum() - (0 if row.isneginf().all() else 1)) <= 1e-5
        assert (weights[row.isneginf()] == 0).all() and (weights >= 0).all()


def test_below_1_every_allowed_key_has_a_weight_and_beyond_2_fewer_have_one() -> None:
    torch.manual_seed(0)
    scores = torch.randn(20, 50).masked_fill(torch.rand(20, 50) < 0.3, -math.inf)
    support = [int((entmax(scores, alpha) > 0).sum()) for alpha in SEVERAL]
    assert support[:4] == [int(scores.isfinite().sum())] * 4
    assert support[3:] == sorted(support[3:], reverse=True) and support[-1] < support[7] < support[5]


def test_one_tensor_may_hold_alphas_from_the_whole_range_one_for_each_head_or_row() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, len(SEVERAL), 3, 20)
    scores[0, :, 1, 5:] = scores[1, :, 2] = -math.inf
    by_head = torch.tensor(SEVERAL, dtype=torch.float64)[:, None, None]
    weights = entmax(scores, by_head)
    for head, alpha in enumerate(SEVERAL):
        torch.testing.assert_close(weights[:, head], entmax(scores[:, head], alpha), atol=2e-6, rtol=0)
    by_row = by_head.expand(2, -1, 3, 1)
    torch.testing.assert_close(entmax(scores, by_row), weights, atol=0, rtol=0)
    for alpha in (0.2, 1.5, 3.0):  # one number for all, with or without dimensions
        one = torch.tensor(alpha, dtype=torch.float64)
        for shaped in (one, one[None], one[None, None, None]):
            torch.testing.assert_close(entmax(scores, shaped), entmax(scores, alpha), atol=2e-6, rtol=0)


@each_alpha
def test_every_dimension_can_be_the_one_of_the_keys(alpha: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5)
    for dim in range(3):
        weights = entmax(x.movedim(dim, -1), alpha).movedim(-1, dim)
        torch.testing.assert_close(weights.sum(dim), torch.ones_like(x.sum(dim)), atol=1e-5, rtol=0)
        row = tuple(0 if d != dim else slice(None) for d in range(3))
        torch.testing.assert_close(weights[row].double(), by_bisection(x[row], alpha), atol=1e-6, rtol=0)


@each_alpha
def test_forbidden_keys_leave_the_others_as_if_they_were_not_there(alpha: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(10, 30)
    masked = scores.clone()
    masked[:, 12:] = -math.inf
    torch.testing.assert_close(entmax(masked, alpha)[:, :12], entmax(scores[:, :12], alpha), atol=1e-6, rtol=0)
    parameter = torch.full((10, 1), alpha).clamp(0.2, 4).double().requires_grad_()
    masked[3] = -math.inf
    masked.requires_grad_()
    gradients = torch.autograd.grad(entmax(masked, parameter), (masked, parameter), torch.randn(10, 30))
    assert all(gradient.isfinite().all() and (gradient[3] == 0).all() for gradient in gradients)
    assert (gradients[0][:, 12:] == 0).all() and gradients[1].any()


@pytest.mark.parametrize("alpha", [0.25, 0.7, 0.999, 1.001, 1.6, 1.999, 2.001, 2.2, 3.0, 3.9])
def test_first_and_second_derivatives_in_scores_and_alpha(alpha: float) -> None:
    torch.manual_seed(1)
    scores = torch.randn(3, 7, dtype=torch.float64)
    scores[1, 2] = -math.inf
    scores.requires_grad_()
    alphas = torch.full((3, 1), alpha, dtype=torch.float64, requires_grad=True)

    def masked(x: Tensor, a: Tensor) -> Tensor:
        return entmax(torch.where(scores.isinf(), -math.inf, x), a)

    finite = scores.detach().clamp_min(-9).requires_grad_()
    assert torch.autograd.gradcheck(masked, (finite, alphas))
    assert torch.autograd.gradgradcheck(masked, (finite, alphas))
    assert torch.autograd.gradcheck(lambda x: masked(x, alphas.detach()), (finite,))
    assert torch.autograd.gradcheck(lambda x: entmax(x, alpha), (finite,))


def test_alphas_outside_the_range_or_of_another_shape_are_refused() -> None:
    scores = torch.zeros(4, 4)
    for alpha in (0.19, 4.01, math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="alpha is"):
            entmax(scores, alpha)
        with pytest.raises(ValueError, match="alpha holds"):
            entmax(scores, torch.tensor([[1.5], [1.5], [alpha], [1.5]]))
    for shape in ((4,), (4, 4), (3, 1), (2, 4, 1)):  # of which the first two would be one alpha a key
        with pytest.raises(ValueError, match="does not broadcast"):
            entmax(scores, torch.full(shape, 1.5))


def test_where_no_value_can_be_looked_at_an_alpha_outside_gives_no_number(patch: Patch) -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 9)
    alpha = torch.tensor([[0.1], [0.3], [3.5], [5.0]])
    expected = entmax(scores[[1, 2]], alpha[[1, 2]])
    patch(torch.compiler, "is_compiling", lambda: True)
    weights = entmax(scores, alpha)
    assert weights[[0, 3]].isnan().all()
    torch.testing.assert_close(weights[[1, 2]], expected, atol=1e-6, rtol=0)


@pytest.mark.process
@pytest.mark.slow
def test_the_whole_range_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    scores, alpha = torch.randn(4, 9), torch.tensor([[0.2], [0.9], [1.5], [3.5]])
    compiled = torch.compile(entmax, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(scores, alpha), entmax(scores, alpha), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bounds", [(1.0, 2.0), (0.2, 1.0), (1.0, 4.0), ALPHAS])
def test_a_learned_alpha_stays_inside_its_range_and_learns(bounds: tuple[float, float]) -> None:
    torch.manual_seed(0)
    start = sum(bounds) / 2 + 0.1
    module = Attention(16, 2, AttnConfig("entmax-learned", alpha=start, alpha_range=bounds))
    torch.testing.assert_close(module.learned()["alpha"], torch.full((2,), start))
    x = torch.randn(2, 5, 16)
    expected = Attention(16, 2, AttnConfig("entmax", alpha=start))
    expected.load_state_dict(module.state_dict(), strict=False)
    torch.testing.assert_close(module(x, x, x), expected(x, x, x), atol=1e-5, rtol=0)
    module(x, x, x).square().sum().backward()
    assert module.alpha_logit.grad is not None and (module.alpha_logit.grad != 0).all()
    for logit in (-1e4, 1e4):
        torch.nn.init.constant_(module.alpha_logit, logit)
        alpha = module.learned()["alpha"]
        assert ((alpha >= bounds[0]) & (alpha <= bounds[1])).all() and module(x, x, x).isfinite().all()


def test_the_default_range_computes_in_float32_and_looks_at_no_value() -> None:
    scores, alpha = torch.randn(3, 4, device="meta"), torch.ones(3, 1, device="meta")
    assert entmax_up_to(2.0, scores, alpha).dtype == torch.float32
    assert entmax_up_to(4.0, scores, alpha).dtype == torch.float32


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"alpha": 0.1}, "attn.alpha is 0.1"),
        ({"alpha": 4.5}, "attn.alpha is 4.5"),
        ({"alpha_range": (0.1, 2.0)}, "attn.alpha_range is 0.1 2"),
        ({"alpha_range": (2.0, 1.0)}, "attn.alpha_range is 2 1"),
        ({"kind": "entmax-learned", "alpha": 2.0}, r"starts inside attn.alpha_range \(1, 2\)"),
        ({"kind": "entmax-learned", "alpha": 1.5, "alpha_range": (2.0, 3.0)}, "starts inside"),
    ],
)
def test_settings_outside_their_range_are_refused_when_the_config_is_made(
    settings: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        AttnConfig(**settings)  # type: ignore[arg-type]
