"""Attention against nn.MultiheadAttention, a slow account of the formula, padding, and the compiler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fabric.benchmark import attention as benchmark
from detr_fabric.config import AttnConfig, Mapping
from detr_fabric.model import mappings
from detr_fabric.model.attention import Attention, attend_with_softmax
from detr_fabric.model.entmax import entmax, entmax15, sparsemax
from tests.patching import Patch

DIM, HEADS, B, T, S = 32, 4, 3, 5, 9
MAPPINGS: tuple[Mapping, ...] = get_args(Mapping)
every = pytest.mark.parametrize("mapping", MAPPINGS)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query (B, T, D), key and value (B, S, D), padding (B, S) of which image 1 has 4 and image 2 none."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, n, DIM, dtype=dtype, requires_grad=True) for n in (T, S, S))
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, 2:] = padding[1, 5:] = True
    return query, key, value, padding


def attention(mapping: Mapping, dropout: float = 0.0) -> Attention:
    """With weights far enough apart that sparse mappings are sparse and biases that are not 0."""
    torch.manual_seed(1)
    module = Attention(DIM, HEADS, AttnConfig(mapping, alpha=1.3, topk=3), dropout=dropout)
    nn.init.normal_(module.in_proj_weight, std=0.4)
    nn.init.normal_(module.in_proj_bias, std=0.1)
    nn.init.normal_(module.out_proj.bias, std=0.1)
    return module


def observed(module: Attention, *arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and weights of a forward pass."""
    weights: list[Tensor] = []
    module.observer = weights.append
    out = module(*arguments)
    module.observer = None
    return out, weights[0]


def test_parameters_are_those_of_torch_and_its_state_dict_loads_unchanged() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(DIM, HEADS)
    torch.manual_seed(0)
    ours = Attention(DIM, HEADS, AttnConfig())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name  # also the initial values, draw by draw
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours.in_proj_bias, theirs.in_proj_bias)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("explicit", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_softmax_matches_torch_forward_and_backward(
    explicit: bool, padded: bool, dtype: torch.dtype, tolerance: float
) -> None:
    query, key, value, padding = inputs(dtype)
    ours = attention("softmax").to(dtype)
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    mask = padding if padded else None
    expected, expected_weights = theirs(query, key, value, key_padding_mask=mask, average_attn_weights=False)
    if explicit:
        out, weights = observed(ours, query, key, value, mask)
        torch.testing.assert_close(weights, expected_weights, atol=tolerance, rtol=0)
    else:
        out = ours(query, key, value, mask)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)
    g = torch.randn_like(out)
    gradients = torch.autograd.grad(out, [query, key, value, *ours.parameters()], g)
    expected_gradients = torch.autograd.grad(expected, [query, key, value, *theirs.parameters()], g)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@every
def test_every_mapping_matches_the_formula_image_by_image_without_its_padding(mapping: Mapping) -> None:
    query, key, value, padding = inputs(torch.float64)
    module = attention(mapping).double()
    by_row: dict[Mapping, Callable[[Tensor], Tensor]] = {
        "softmax": lambda row: row.softmax(0),
        "sparsemax": sparsemax,
        "entmax15": entmax15,
        "entmax": lambda row: entmax(row, 1.3),
        "entmax-learned": lambda row: entmax(row, 1.3),
        "sigmoid": mappings.sigmoid,
        "relu": mappings.relu,
        "softmax1": mappings.softmax1,
        "topk": lambda row: mappings.topk(row, 3),
    }
    w, b = module.in_proj_weight, module.in_proj_bias
    expected = torch.zeros(B, T, DIM, dtype=torch.float64)
    for image in range(B):
        keep = ~padding[image]
        q = query[image] @ w[:DIM].T + b[:DIM]
        k = key[image, keep] @ w[DIM : 2 * DIM].T + b[DIM : 2 * DIM]
        v = value[image, keep] @ w[2 * DIM :].T + b[2 * DIM :]
        for head in range(HEADS):
            part = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
            for t in range(T):
                weights = by_row[mapping](k[:, part] @ q[t, part] / math.sqrt(DIM / HEADS))
                expected[image, t, part] = weights @ v[:, part]
    expected = expected @ module.out_proj.weight.T + module.out_proj.bias
    torch.testing.assert_close(module(query, key, value, padding), expected, atol=1e-6, rtol=0)


@every
def test_weights_are_observed_on_request_and_change_nothing(mapping: Mapping) -> None:
    query, key, value, padding = inputs()
    module = attention(mapping)
    plain = module(query, key, value, padding)
    out, weights = observed(module, query, key, value, padding)
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=0)
    assert weights.shape == (B, HEADS, T, S)
    assert (weights.masked_select(padding[:, None, None, :]) == 0).all()
    if mapping not in ("sigmoid", "relu", "softmax1"):
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, HEADS, T), atol=1e-5, rtol=0)


@every
def test_an_image_without_keys_gives_the_bias_and_finite_gradients(mapping: Mapping) -> None:
    query, key, value, padding = inputs()
    module = attention(mapping)
    others = module(query, key, value, padding)
    padding[1] = True
    out = module(query, key, value, padding)
    torch.testing.assert_close(out[1], module.out_proj.bias.expand(T, DIM), atol=0, rtol=0)
    torch.testing.assert_close(out[[0, 2]], others[[0, 2]], atol=1e-5, rtol=0)
    _, weights = observed(module, query, key, value, padding)
    assert (weights[1] == 0).all()
    for gradient in torch.autograd.grad(out.square().sum(), [query, key, value, *module.parameters()]):
        assert gradient.isfinite().all()
    (gradient,) = torch.autograd.grad(module(query, key, value, padding)[1].sum(), key)
    assert not gradient.any()


@every
def test_dropout_drops_weights_in_training_only_and_is_not_observed(mapping: Mapping) -> None:
    module = attention(mapping, dropout=0.25)
    torch.manual_seed(2)
    q, k = torch.randn(B, HEADS, 400, DIM // HEADS), torch.randn(B, HEADS, S, DIM // HEADS)
    values = torch.eye(S).expand(B, HEADS, S, S)  # so that the heads are the weights
    undropped: list[Tensor] = []
    module.observer = undropped.append
    module.attend(q, k, values)
    module.observer = None
    dropped = module.attend(q, k, values)
    module.eval()
    torch.testing.assert_close(module.attend(q, k, values), undropped[0], atol=1e-5, rtol=0)
    gone = (dropped == 0) & (undropped[0] != 0)
    torch.testing.assert_close(dropped, (undropped[0] / 0.75).masked_fill(gone, 0), atol=1e-5, rtol=0)
    assert 0.22 < gone.sum() / (undropped[0] != 0).sum() < 0.28


def test_learned_alpha_starts_where_told_and_learns_one_value_a_head() -> None:
    query, key, value, padding = inputs()
    module = attention("entmax-learned")
    torch.testing.assert_close(module.learned()["alpha"], torch.full((HEADS,), 1.3))
    assert set(module.state_dict()) - set(nn.MultiheadAttention(DIM, HEADS).state_dict()) == {"alpha_logit"}
    optimizer = torch.optim.SGD([module.alpha_logit], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        module(query, key, value, padding).square().sum().backward()
        optimizer.step()
    assert len(set(module.learned()["alpha"].tolist())) == HEADS
    nn.init.constant_(module.alpha_logit, 1e4)
    assert (module.learned()["alpha"] <= 2).all() and module(query, key, value, padding).isfinite().all()
    assert not hasattr(attention("entmax"), "alpha_logit")


def test_learned_alpha_at_one_half_more_is_entmax15() -> None:
    query, key, value, padding = inputs()
    module = attention("entmax-learned")
    nn.init.zeros_(module.alpha_logit)
    expected = attention("entmax15")(query, key, value, padding)
    torch.testing.assert_close(module(query, key, value, padding), expected, atol=1e-5, rtol=0)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_scores_and_weights_are_float32(mapping: Mapping, dtype: torch.dtype) -> None:
    query, key, value, padding = inputs()
    module = attention(mapping)
    exact = module(query, key, value, padding)
    with torch.autocast("cpu", dtype):
        out = module(query, key, value, padding)
        _, weights = observed(module, query, key, value, padding)
    assert out.dtype == dtype and weights.dtype == torch.float32
    if mapping not in ("sigmoid", "relu", "softmax1"):
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, HEADS, T), atol=1e-5, rtol=0)
    error = (out.float() - exact).norm() / exact.norm()
    assert error < 20 * torch.finfo(dtype).eps
    for gradient in torch.autograd.grad(out.float().sum(), [query, key, value, *module.parameters()]):
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()


def check_compiled(mapping: Mapping, backend: str) -> None:
    query, key, value, padding = inputs()
    module = attention(mapping)
    torch.compiler.reset()  # there is a limit to the mappings that one forward is compiled for
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    everything = [query, key, value, *module.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = module(query, key, value, padding), compiled(query, key, value, padding)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    g = torch.randn_like(out)
    pairs = zip(torch.autograd.grad(out, everything, g), torch.autograd.grad(expected, everything, g), strict=True)
    for a, b in pairs:
        assert (a - b).norm() <= 0.03 * b.norm() + 1e-6


@pytest.mark.process
@pytest.mark.parametrize("mapping", ["softmax", "sparsemax", "entmax-learned"])  # all of them below, in the long form
def test_compiles_into_one_graph_under_autocast(mapping: Mapping) -> None:
    check_compiled(mapping, "aot_eager")


@pytest.mark.process
@pytest.mark.slow
@every
def test_compiles_with_inductor_under_autocast(mapping: Mapping) -> None:
    check_compiled(mapping, "inductor")


def test_softmax_materialises_no_weights(patch: Patch) -> None:
    query, key, value, padding = inputs()
    calls: list[bool] = []
    fused = F.scaled_dot_product_attention
    patch(F, "scaled_dot_product_attention", lambda *a: calls.append(True) or fused(*a))
    module = attention("softmax")
    module(query, key, value, padding)
    assert len(calls) == 1
    observed(module, query, key, value, padding)
    assert len(calls) == 1


def test_the_benchmark_measures_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SHAPES", {"small": (6, 8)})
    rows = benchmark.measure(torch.device("cpu"), quick=True, seconds=0.1).rows
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) and {"explicit softmax", "SDPA", "ours: sparsemax"} <= set(names)
    assert all(row["ms"] > 0 and row["peak_mb"] > 0 and row["ratio"] > 0 for row in rows)
    assert next(row["ratio"] for row in rows if row["name"] == "explicit softmax") == 1


def test_the_benchmark_has_a_row_for_each_fused_mapping_where_kernels_agree() -> None:
    padding = torch.zeros(1, 2, dtype=torch.bool)
    plain, fused = (set(benchmark._contenders(padding, kernels)) for kernels in (False, True))
    assert fused - plain == {f"fused: {name}" for name in benchmark.OURS if name != "softmax"}


@every
def test_softmax_first_trains_with_softmax_and_evaluates_with_the_mapping(mapping: Mapping) -> None:
    query, key, value, padding = inputs()
    module, softmax = attention(mapping), attention("softmax")
    own = module(query, key, value, padding)
    attend_with_softmax(module, True)
    out = module(query, key, value, padding)
    torch.testing.assert_close(out, softmax(query, key, value, padding))
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())  # DDP waits for every one
    if mapping == "entmax-learned":
        assert torch.equal(module.alpha_logit.grad, torch.zeros(HEADS))
    assert torch.equal(module.eval()(query, key, value, padding), own)
    attend_with_softmax(module.train(), False)
    assert torch.equal(module(query, key, value, padding), own)
