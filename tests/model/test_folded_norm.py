"""Frozen batch norm folded into convolutions: the same as applied after them, however its statistics come to change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from detr_fabric.model.backbone import Backbone


def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone("resnet18", "layer1")


def features(model: Backbone, images: Tensor) -> Tensor:
    out: Tensor = model(images, torch.zeros(len(images), *images.shape[2:], dtype=torch.bool))[0]
    return out


def torchvisions(model: Backbone) -> nn.Sequential:
    """torchvision's own body, where each norm follows its convolution, with the weights and statistics of ours."""
    resnet = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    body = nn.Sequential(*(getattr(resnet, name) for name, _ in model.body.named_children()))
    state = zip(body.state_dict(), model.body.state_dict().values(), strict=True)
    body.to(next(model.parameters()).dtype).load_state_dict(dict(state))
    return body


def another_state(model: Backbone) -> Backbone:
    torch.manual_seed(1)
    model.load_state_dict({name: torch.rand_like(value) + 0.1 for name, value in model.state_dict().items()})
    return model


def writes_past_autograd(model: Backbone) -> Backbone:
    for value in (*model.parameters(), *model.buffers()):
        value.data.mul_(0.9)
    return model


@pytest.mark.parametrize(
    "change",
    [another_state, writes_past_autograd, copy.deepcopy, lambda m: another_state(copy.deepcopy(m)), nn.Module.double],
)
def test_statistics_that_change_after_a_forward_pass_are_those_of_the_next(
    change: Callable[[Backbone], Backbone],
) -> None:
    model = backbone()
    images = torch.rand(1, 3, 48, 48)
    features(model, images)
    model = change(model)
    images = images.to(next(model.parameters()).dtype)
    expected = torchvisions(model)(images)
    torch.testing.assert_close(features(model, images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_norms_after_convolutions(compiled: bool) -> None:
    model = another_state(backbone()).double()
    images = torch.rand(2, 3, 48, 48, dtype=torch.float64)
    reference = torchvisions(model)
    out = reference(images)
    g = torch.randn_like(out)
    expected = torch.autograd.grad(out, list(reference.parameters()), g)
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(features(model, images), list(model.body.parameters()), g)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


def test_in_mixed_precision_only_the_product_is_rounded() -> None:
    model = backbone()
    conv = model.folded[3]
    conv.norm[0].running_var.uniform_(0.5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        features(model, torch.rand(1, 3, 32, 32))
        found = conv(x := torch.rand(1, conv.in_channels, 8, 8).bfloat16())
    weight = (conv.weight * conv.scale[:, None, None, None]).bfloat16()
    assert conv.scale.dtype == torch.float32
    assert torch.equal(found, conv._conv_forward(x, weight, conv.shift.bfloat16()))
