"""Attention that keeps no weights for the backward pass: softmax's memory, and the same numbers bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast, get_args

import pytest
import torch
from torch import Tensor

from detr_fabric.config import AttnConfig, Config, Mapping, changes_results
from detr_fabric.model import attention as attention_module
from detr_fabric.model.attention import Attention, attend_with_softmax
from tests.patching import Patch

MAPPINGS: tuple[Mapping, ...] = get_args(Mapping)
every = pytest.mark.parametrize("mapping", MAPPINGS)


def block(mapping: Mapping, recompute: bool | None, dim: int = 32, dropout: float = 0.25) -> Attention:
    torch.manual_seed(1)
    return Attention(dim, 4, AttnConfig(mapping, alpha=1.3, topk=3, recompute=recompute), dropout=dropout)


def padded(batch: int, tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, S, D) and their padding (B, S); the last image has no token that is not padding."""
    torch.manual_seed(2)
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[0, 2 * tokens // 3 :] = padding[-1] = True
    return torch.randn(batch, tokens, dim, requires_grad=True), padding


def trained(module: Attention, x: Tensor, padding: Tensor) -> list[Tensor]:
    """The output of a step and its gradients."""
    torch.manual_seed(3)
    out = module(x, x, x, padding)
    torch.manual_seed(4)  # the dropout drawn again must not depend on what was drawn since
    return [out, *torch.autograd.grad((out * torch.randn_like(out)).sum(), [x, *module.parameters()])]


def kept_bytes(module: Attention, x: Tensor, padding: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters and input included."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(x, x, x, padding)
    assert out.requires_grad
    return sum(storages.values())


@every
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_are_equal_bit_for_bit_to_those_of_kept_weights(mapping: Mapping, dropout: float) -> None:
    x, padding = padded(3, 9, 32)
    kept = trained(block(mapping, False, dropout=dropout), x, padding)
    recomputed = trained(block(mapping, True, dropout=dropout), x, padding)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.process
@pytest.mark.parametrize("mapping", ["sparsemax", "entmax-learned"])
def test_one_encoder_layer_at_1400_tokens_keeps_what_softmax_keeps(mapping: Mapping) -> None:
    x, padding = padded(4, 1400, 256)
    softmax = kept_bytes(block("softmax", None, 256, dropout=0.0), x, padding)
    assert kept_bytes(block(mapping, True, 256), x, padding) <= 1.3 * softmax


def test_unset_it_is_left_to_a_gpu_and_evaluation_and_observers_go_without(patch: Patch) -> None:
    x, padding = padded(2, 60, 32)
    weights_bytes = 2 * 4 * 60 * 60 * 4
    assert kept_bytes(block("sparsemax", None), x, padding) > weights_bytes
    on_gpu = cast(Tensor, SimpleNamespace(device=torch.device("cuda")))
    assert block("sparsemax", None)._recomputes(on_gpu) and not block("sparsemax", False)._recomputes(on_gpu)
    calls: list[bool] = []
    checkpoint = attention_module.checkpoint
    patch(attention_module, "checkpoint", lambda *a, **k: calls.append(True) or checkpoint(*a, **k))
    module = block("sparsemax", True)
    with torch.no_grad():
        module(x, x, x, padding)
    seen: list[Tensor] = []
    module.observer = seen.append
    module(x, x, x, padding).sum().backward()
    assert len(seen) == 1 and not calls
    module.observer = None
    attend_with_softmax(module, True)
    module.dropout = 0.0
    module(x, x, x, padding)  # fused: nothing to compute again
    assert not calls
    attend_with_softmax(module, False)
    module(x, x, x, padding)
    assert len(calls) == 1


@pytest.mark.process
@pytest.mark.parametrize("mapping", ["sparsemax", "entmax-learned"])
def test_it_compiles_into_one_graph_with_the_same_gradients(mapping: Mapping) -> None:
    x, padding = padded(3, 9, 32)
    module = block(mapping, True, dropout=0.0)
    expected = trained(module, x, padding)
    torch.compiler.reset()
    module.compile(backend="aot_eager", fullgraph=True)
    for a, b in zip(trained(module, x, padding), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_run_may_be_resumed_with_another_value() -> None:
    assert not changes_results("attn.recompute", Config())
