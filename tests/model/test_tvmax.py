"""TVmax against a slow float64 solver of its joint problem, finite differences, and each image's own grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from detr_fabric.analysis.capture import capture
from detr_fabric.config import AttnConfig, Config, ModelConfig
from detr_fabric.errors import UserError
from detr_fabric.export import verified
from detr_fabric.export.settings import Settings
from detr_fabric.model import tvmax as module
from detr_fabric.model.attention import Attention
from detr_fabric.model.build import build_model
from detr_fabric.model.entmax import sparsemax
from detr_fabric.model.tvmax import tvmax
from detr_fabric.predict.detector import Detector

each_strength = pytest.mark.parametrize("strength", [0.01, 0.1, 0.3, 1.0])


def slowly(z: Tensor, strength: float) -> Tensor:
    """The joint problem of one grid (h, w), as a quadratic programme with a variable for each edge's difference."""
    h, w = z.shape
    index, n = np.arange(h * w).reshape(h, w), h * w
    edges = [*zip(index[1:].ravel(), index[:-1].ravel(), strict=True)]
    edges += [*zip(index[:, 1:].ravel(), index[:, :-1].ravel(), strict=True)]
    d = np.zeros((len(edges), n))
    for row, (one, other) in enumerate(edges):
        d[row, one], d[row, other] = 1, -1
    target, eye = z.double().numpy().ravel(), np.eye(len(edges))
    sides = np.vstack([np.hstack([-d, eye]), np.hstack([d, eye])])  # both >= 0: the variable is at least |difference|
    start = np.r_[np.full(n, 1 / n), np.full(len(edges), 0.1)]
    solved = minimize(
        lambda x: 0.5 * ((x[:n] - target) ** 2).sum() + strength * x[n:].sum(),
        start,
        jac=lambda x: np.r_[x[:n] - target, np.full(len(edges), strength)],
        bounds=[(0, None)] * len(start),
        constraints=[
            {"type": "ineq", "fun": lambda x: sides @ x, "jac": lambda x: sides},
            {
                "type": "eq",
                "fun": lambda x: x[:n].sum() - 1,
                "jac": lambda x: np.r_[np.ones(n), np.zeros(len(edges))],
            },
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    return torch.from_numpy(solved.x[:n]).view(h, w)


@each_strength
def test_weights_are_within_1e_5_of_the_joint_problem_solved_slowly(strength: float) -> None:
    torch.manual_seed(0)
    for h, w in ((3, 4), (1, 6)):
        z = torch.randn(2, h * w)
        weights = tvmax(z, (h, w), strength)
        assert weights.dtype == torch.float32
        for row, found in zip(z, weights, strict=True):
            torch.testing.assert_close(found.double().view(h, w), slowly(row.view(h, w), strength), atol=1e-5, rtol=0)


@pytest.mark.process
@each_strength
def test_at_cocos_size_many_more_steps_move_no_weight_by_1e_5(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    z = torch.randn(3, 25 * 38)
    weights = tvmax(z, (25, 38), strength)
    monkeypatch.setattr(module, "GAP", 1e-15)
    monkeypatch.setattr(module, "MOST_STEPS", 20_000)
    torch.testing.assert_close(weights, tvmax(z, (25, 38), strength), atol=1e-5, rtol=0)


def test_without_strength_it_is_sparsemax_and_with_much_it_is_even() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 42)
    torch.testing.assert_close(tvmax(z, (6, 7), 0.0), sparsemax(z), atol=1e-6, rtol=0)
    torch.testing.assert_close(tvmax(z, (6, 7), 100.0), torch.full_like(z, 1 / 42), atol=1e-5, rtol=0)


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_the_gradient_is_that_of_finite_differences(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    z = torch.randn(5, 42, dtype=torch.float64)
    z[1, 21:] = -math.inf
    g, step = torch.randn_like(z), 1e-5
    (gradient,) = torch.autograd.grad(tvmax(z.requires_grad_(), (6, 7), strength), z, g)
    assert (gradient[1, 21:] == 0).all()
    monkeypatch.setattr(module, "GAP", 1e-22)
    moves = step * torch.eye(42, dtype=torch.float64)[:, None]  # each cell of every row at once
    with torch.no_grad():
        above, below = (tvmax(z + move, (6, 7), strength) for move in (moves, -moves))
    errors = ((((above - below) * g).sum(-1) / (2 * step)).T - gradient).abs()
    assert errors.max() < 1e-4 and errors.median() < 1e-6


def test_padding_leaves_each_image_its_own_grid() -> None:
    torch.manual_seed(3)
    z = torch.randn(2, 3, 6, 7)
    padded = z.clone()
    padded[1, :, 4:] = padded[1, :, :, 5:] = -math.inf
    weights = tvmax(padded.flatten(2), (6, 7), 0.2).view_as(z)
    alone = tvmax(z[1, :, :4, :5].flatten(1), (4, 5), 0.2).view(3, 4, 5)
    torch.testing.assert_close(weights[1, :, :4, :5], alone, atol=1e-5, rtol=0)
    assert (weights[1, :, 4:] == 0).all() and (weights[1, :, :, 5:] == 0).all()
    torch.testing.assert_close(weights[0], tvmax(z[0].flatten(1), (6, 7), 0.2).view(3, 6, 7), atol=1e-5, rtol=0)
    nothing = torch.full((2, 42), -math.inf, requires_grad=True)
    gone = tvmax(nothing, (6, 7), 0.2)
    assert (gone == 0).all() and (torch.autograd.grad(gone.sum(), nothing)[0] == 0).all()


def test_a_detr_attends_with_it_to_each_images_own_features_and_learns() -> None:
    torch.manual_seed(0)
    small = ModelConfig("resnet18", last_stage="layer1", hidden_dim=32, heads=4, enc_layers=1, dec_layers=2)
    config = Config(model=small, attn=AttnConfig(decoder_cross="tvmax", tv=0.01)).resolve()
    assert config.attn.softmax_first == 0.5
    model = build_model(config.model, config.attn, 5, pretrained=False).train()
    images, mask = torch.randn(2, 3, 32, 48), torch.zeros(2, 32, 48, dtype=torch.bool)
    mask[1, :, 28:] = True
    images[1, :, :, 28:] = 0
    outputs = model(images, mask)
    outputs.pred_boxes.square().sum().backward()
    block = cast(Attention, model.transformer.decoder.layers[0].multihead_attn)
    assert block.in_proj_weight.grad is not None and block.in_proj_weight.grad.isfinite().all()
    with torch.no_grad(), capture(model.eval()) as seen:
        model(images, mask)
    weights = seen.weights["decoder_cross"][0].unflatten(-1, (8, 12))
    assert (weights[1, ..., 7:] == 0).all()
    torch.testing.assert_close(weights.flatten(-2).sum(-1), torch.ones(weights.shape[:3]), atol=1e-5, rtol=0)


def test_export_says_plainly_that_it_cannot(tmp_path: Path) -> None:
    config = Config(attn=AttnConfig(decoder_cross="tvmax"))
    detector = cast(Detector, type("Loaded", (), {"config": config})())
    with pytest.raises(UserError, match="tvmax is solved in steps"):
        verified.export(detector, Settings(checkpoint="x.ckpt", out=f"{tmp_path}/x.onnx"))
