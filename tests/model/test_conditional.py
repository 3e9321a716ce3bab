"""Conditional DETR: equal to transformers', with every mapping, seen by the instruments, under names that stay."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from detr_fabric.analysis.capture import capture
from detr_fabric.config import AttnConfig, CrossMapping, ModelConfig
from detr_fabric.model.attention import attend_with_softmax
from detr_fabric.model.backbone import Backbone
from detr_fabric.model.build import build_model
from detr_fabric.model.conditional import ConditionalDETR
from detr_fabric.model.detr import DETR
from detr_fabric.model.position import SinePosition, sines
from detr_fabric.model.transformer import Decoder, Encoder
from tests.model.test_detr import SMALL, noise, vary_statistics


def conditional_detr(backbone: str = "resnet18", attn: AttnConfig | None = None, **changes: Any) -> DETR:
    """With weights as if it were trained: no box head of 0, and reference points that differ."""
    small = {"backbone": backbone, "backbone_weights": "none", "norm": "frozen", **SMALL, **changes}
    torch.manual_seed(0)
    model = build_model(ModelConfig(cross_attention="conditional", **small), attn or AttnConfig(), num_classes=5)
    with torch.no_grad():
        for p in model.bbox_embed.parameters():
            p.normal_(std=0.3)
        for p in model.transformer.decoder.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_outputs_equal_transformers_on_a_padded_batch(backbone: str) -> None:
    """Of every layer: transformers' model is cut after each, because it gives the last layer's outputs alone."""
    pytest.importorskip("transformers")
    from detr_fabric.benchmark.baseline import transformers_detr

    config = ModelConfig(backbone=backbone, backbone_weights="none", norm="frozen", **SMALL)
    config = replace(config, cross_attention="conditional")
    model = conditional_detr(backbone)
    vary_statistics(model)
    baseline = transformers_detr(model, config, num_classes=5).eval()
    batch = noise((96, 128), (128, 80))
    layers = baseline.model.decoder.layers
    with torch.no_grad():
        ours = model(*batch)
        for layer in range(config.dec_layers):
            baseline.model.decoder.layers = layers[: layer + 1]
            theirs = baseline(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
            torch.testing.assert_close(ours.pred_logits[layer], theirs.logits, rtol=0, atol=1e-4)
            torch.testing.assert_close(ours.pred_boxes[layer], theirs.pred_boxes, rtol=0, atol=1e-4)
    assert float(ours.pred_boxes.std()) > 1e-2 and float(ours.pred_logits.std()) > 1e-2


def test_points_are_encoded_as_the_positions_of_features() -> None:
    position = SinePosition(32)(torch.zeros(1, 4, 8, dtype=torch.bool))[0]  # (32, 4, 8)
    points = torch.tensor([[3 / 8, 1 / 4], [1.0, 1.0]])  # x and y: the third column of the first row, and the last cell
    torch.testing.assert_close(sines(points.flip(-1), 32), torch.stack([position[:, 0, 2], position[:, 3, 7]]))


@pytest.mark.parametrize("kind", get_args(CrossMapping))
def test_every_mapping_goes_forwards_and_backwards_with_finite_gradients(kind: CrossMapping) -> None:
    attn = AttnConfig("softmax" if kind == "tvmax" else kind, decoder_cross=kind, topk=3)  # type: ignore[arg-type]
    model = conditional_detr(attn=attn, last_stage="layer1").train()
    outputs = model(*noise((32, 32), (24, 16)))
    (outputs.pred_boxes.square().sum() + outputs.pred_logits.square().sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert model.transformer.decoder.ref_point_head.layers[0].weight.grad.any()
    assert model.transformer.decoder.query_scale.layers[0].weight.grad.any()


@pytest.mark.parametrize("pre_norm", [False, True])
def test_recomputation_of_layers_and_of_weights_changes_no_gradient(pre_norm: bool) -> None:
    gradients = []
    for recompute in (False, True):
        attn = AttnConfig("sparsemax", recompute=recompute)
        model = conditional_detr(attn=attn, gradient_checkpointing=recompute, pre_norm=pre_norm, dropout=0.1).train()
        torch.manual_seed(3)
        outputs = model(*noise((64, 64), (32, 64)))
        (outputs.pred_boxes.sum() + outputs.pred_logits.square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_softmax_first_trains_as_softmax_and_evaluates_as_the_mapping() -> None:
    softmax, sparse = conditional_detr(), conditional_detr(attn=AttnConfig("sparsemax"))
    batch = noise((64, 96), (32, 64))
    attend_with_softmax(sparse, True)
    with torch.no_grad():
        assert torch.equal(sparse.train()(*batch).pred_boxes, softmax.train()(*batch).pred_boxes)
        assert not torch.allclose(sparse.eval()(*batch).pred_boxes, softmax.eval()(*batch).pred_boxes)


def test_the_instruments_see_one_dense_map_a_head_and_its_zeros() -> None:
    model = conditional_detr(attn=AttnConfig("sparsemax"))
    batch = noise((64, 96), (64, 32))
    with capture(model) as seen, torch.no_grad():
        model(*batch)
    assert seen.mask is not None and seen.mask.shape == (2, 2, 3)
    for layer in range(3):
        weights = seen.weights["decoder_cross"][layer]
        assert weights.shape == (2, 4, 12, 6) and (weights == 0).any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
        assert not weights[1].masked_select(seen.mask[1].flatten()).any()
        assert seen.weights["decoder_self"][layer].shape == (2, 4, 12, 12)


def test_first_boxes_lie_around_the_reference_points() -> None:
    torch.manual_seed(0)
    model = build_model(
        ModelConfig("resnet18", "none", "frozen", cross_attention="conditional", **SMALL), AttnConfig(), 5
    )
    assert isinstance(model, ConditionalDETR)
    boxes = model.eval()(*noise((64, 64))).pred_boxes
    points: Tensor = model.transformer.decoder.reference(model.query_embed.weight).sigmoid()
    torch.testing.assert_close(boxes[..., :2], points.expand(3, 1, -1, -1))
    assert torch.equal(boxes[..., 2:], torch.full_like(boxes[..., 2:], 0.5))


def test_the_decoder_has_the_names_that_checkpoints_keep() -> None:
    names = {name: list(value.shape) for name, value in conditional_detr().transformer.decoder.state_dict().items()}
    first = {name.removeprefix("layers.0.") for name in names if name.startswith("layers.0.")}
    second = {name.removeprefix("layers.1.") for name in names if name.startswith("layers.1.")}
    linears = (
        "sa_qpos_proj",
        "sa_kpos_proj",
        "ca_qpos_proj",
        "ca_kpos_proj",
        "ca_qpos_sine_proj",
        "linear1",
        "linear2",
    )
    modules = (*linears, "norm1", "norm2", "norm3", "self_attn.out_proj", "multihead_attn.out_proj")
    expected = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
    expected |= {f"{block}.in_proj_{part}" for block in ("self_attn", "multihead_attn") for part in ("weight", "bias")}
    assert first == expected and second == expected - {"ca_qpos_proj.weight", "ca_qpos_proj.bias"}
    heads = {name: shape for name, shape in names.items() if not name.startswith("layers.")}
    assert json.dumps(heads) == json.dumps(
        {
            "norm.weight": [32], "norm.bias": [32],
            "query_scale.layers.0.weight": [32, 32], "query_scale.layers.0.bias": [32],
            "query_scale.layers.1.weight": [32, 32], "query_scale.layers.1.bias": [32],
            "ref_point_head.layers.0.weight": [32, 32], "ref_point_head.layers.0.bias": [32],
            "ref_point_head.layers.1.weight": [2, 32], "ref_point_head.layers.1.bias": [2],
        }
    )  # fmt: skip


def test_the_published_size_is_44_million_parameters() -> None:
    with torch.device("meta"):
        model = build_model(
            ModelConfig(norm="frozen", backbone_weights="none", num_queries=300, cross_attention="conditional"),
            AttnConfig(),
            num_classes=90,
        )
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) in (43, 44)


def test_beside_it_the_original_has_the_initial_weights_that_a_seed_always_gave() -> None:
    """The backbone is drawn first, then the encoder, then the decoder; biases keep what they are drawn as."""
    config = ModelConfig(backbone="resnet18", backbone_weights="none", norm="frozen", **SMALL)
    torch.manual_seed(7)
    built = build_model(config, AttnConfig(), num_classes=5)
    torch.manual_seed(7)
    Backbone("resnet18")
    parts = {"encoder": Encoder(config, AttnConfig()), "decoder": Decoder(config, AttnConfig())}
    for part, module in parts.items():
        for name, value in module.state_dict().items():
            if value.dim() == 1:
                assert torch.equal(built.state_dict()[f"transformer.{part}.{name}"], value), (part, name)
