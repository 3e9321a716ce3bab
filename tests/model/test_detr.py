"""The model beyond the golden numbers: DC5, padding, recomputation, freezing, weights, and transformers' DETR."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from detr_fabric.config import AttnConfig, Config, ModelConfig
from detr_fabric.data.batch import ImageBatch, normalize, pad_images
from detr_fabric.errors import UserError
from detr_fabric.model.backbone import Backbone, dilate, shrink_mask
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR
from detr_fabric.model.position import LearnedPosition
from detr_fabric.model.pretrained import load_backbone_weights

SMALL = dict(hidden_dim=32, heads=4, enc_layers=2, dec_layers=3, dim_feedforward=64, num_queries=12, dropout=0.0)


def small_detr(num_classes: int = 5, focal: bool = False, **changes: object) -> DETR:
    torch.manual_seed(0)
    model = ModelConfig(**{"backbone": "resnet18", "backbone_weights": "none", "norm": "frozen", **SMALL, **changes})
    config = Config(model=model).resolve()
    return build_model(config.model, config.attn, num_classes, focal=focal)


def noise(*sizes: tuple[int, int]) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    return normalize(
        pad_images([torch.randint(0, 256, (3, *s), dtype=torch.uint8, generator=generator) for s in sizes])
    )


def test_every_block_has_its_own_mapping_and_the_models_dropout() -> None:
    attn = AttnConfig(kind="relu", encoder_self="sparsemax", decoder_self="topk", decoder_cross="sigmoid")
    sizes = ModelConfig("resnet18", "none", **{**SMALL, "dropout": 0.25})  # type: ignore[arg-type]
    config = Config(model=sizes, attn=attn).resolve()
    transformer = build_model(config.model, config.attn, num_classes=5).transformer
    encoder, decoder = transformer.encoder.layers[0], transformer.decoder.layers[0]
    blocks = [encoder.self_attn, decoder.self_attn, decoder.multihead_attn]
    assert [block.mapping for block in blocks] == ["sparsemax", "topk", "sigmoid"]
    assert [block.dropout for block in blocks] == [0.25] * 3


def test_weights_of_the_transformer_start_as_xavier_draws_them_and_biases_do_not() -> None:
    """Uniform within sqrt(6 / (inputs + outputs)), Glorot and Bengio 2010, equation 16."""
    for name, p in small_detr().transformer.named_parameters():
        if p.dim() > 1:
            bound = math.sqrt(6 / sum(p.shape))
            assert 0.9 * bound < float(p.detach().abs().max()) <= bound, name


@pytest.mark.parametrize("dilation, stride", [(False, 32), (True, 16)])
def test_a_model_is_built_with_its_dilation(dilation: bool, stride: int) -> None:
    features, _ = small_detr(dilation=dilation).backbone[0](*noise((64, 64)))
    assert features.shape[-1] == 64 // stride


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_dc5_computes_the_strided_features_and_those_between(name: str) -> None:
    torch.manual_seed(0)
    strided = Backbone(name).eval()
    dilated = Backbone(name, dilation=True).eval()
    dilated.load_state_dict(strided.state_dict())
    images, mask = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    with torch.no_grad():
        coarse, fine = strided(images, mask)[0], dilated(images, mask)[0]
    assert fine.shape[-2:] == (4, 6)
    torch.testing.assert_close(fine[..., ::2, ::2], coarse, rtol=1e-4, atol=1e-4 * float(coarse.abs().max()))


def test_dc5_of_a_bottleneck_is_torchvisions() -> None:
    ours = torchvision.models.resnet50(weights=None).layer4
    dilate(ours)
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, False, True]).layer4

    def geometry(stage: nn.Module) -> list[tuple[object, ...]]:
        convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
        return [(conv.stride, conv.padding, conv.dilation, conv.kernel_size) for conv in convs]

    assert geometry(ours) == geometry(theirs)


@pytest.mark.parametrize("stage, stride", [("layer1", 4), ("layer2", 8), ("layer3", 16), ("layer4", 32)])
def test_features_of_the_chosen_stage_reach_the_transformer(stage: str, stride: int) -> None:
    model = small_detr(last_stage=stage)
    batch = noise((96, 64))
    features, mask = model.backbone[0](*batch)
    assert features.shape == (1, 64 * stride // 4, 96 // stride, 64 // stride)
    assert mask.shape == features.shape[:1] + features.shape[2:]
    assert model(*batch).pred_boxes.shape == (3, 1, 12, 4)


def test_masks_are_shrunk_as_the_original_does_at_every_size() -> None:
    for side in range(2, 1400):
        pixels = torch.arange(side).view(1, 1, side)
        for stride in (4, 8, 16, 32):
            features = -(-side // stride)
            expected = nn.functional.interpolate(pixels.float()[None], size=(1, features))[0].long()
            assert torch.equal(shrink_mask(pixels, 1, features), expected), (side, stride)
            assert torch.equal(shrink_mask(pixels.mT, features, 1), expected.mT), (side, stride)


def test_an_image_is_seen_the_same_alone_and_inside_a_padded_batch_of_equal_features() -> None:
    """Padding to a multiple of the stride changes nothing but the border that convolutions see as zeros anyway."""
    model = small_detr().eval()
    alone = noise((64, 96))
    padded = ImageBatch(
        torch.nn.functional.pad(alone.images, (0, 64, 0, 32)),
        torch.nn.functional.pad(alone.mask, (0, 64, 0, 32), value=True),
    )
    with torch.no_grad():
        features, mask = model.backbone[0](*alone)
        padded_features, padded_mask = model.backbone[0](*padded)
        assert torch.equal(~padded_mask, torch.nn.functional.pad(~mask, (0, 2, 0, 1)))
        positions = model.backbone[1](mask)
        torch.testing.assert_close(model.backbone[1](padded_mask)[..., :2, :3], positions)
        queries = model.query_embed.weight

        def tokens(x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2)

        src = model.input_proj(features)
        hs = model.transformer(tokens(src), mask.flatten(1), queries, tokens(positions))
        wide = torch.randn(*src.shape[:2], 3, 5)
        wide[..., :2, :3] = src
        pos = model.backbone[1](padded_mask)
        padded_hs = model.transformer(tokens(wide), padded_mask.flatten(1), queries, tokens(pos))
    torch.testing.assert_close(padded_hs, hs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_gradient_checkpointing_computes_blocks_again_and_gives_the_same_gradients(pre_norm: bool) -> None:
    gradients, computed = [], list[nn.Module]()
    for recompute in (False, True):
        model = small_detr(gradient_checkpointing=recompute, pre_norm=pre_norm, dropout=0.1).train()
        transformer = model.transformer
        blocks = (model.backbone[0].body.layer2, transformer.encoder.layers[0], transformer.decoder.layers[0])
        for block in blocks:
            block.register_forward_pre_hook(lambda block, _: computed.append(block))
        torch.manual_seed(3)
        outputs = model(*noise((64, 64), (32, 64)))
        (outputs.pred_boxes.sum() + outputs.pred_logits.square().sum()).backward()
        assert [computed.count(block) for block in blocks] == [1 + recompute] * len(blocks)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_parts_have_no_gradient_and_their_statistics_stand_still() -> None:
    model = small_detr(norm="batch", freeze=("stem", "layer1", "decoder")).train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    model(*noise((64, 64))).pred_boxes.sum().backward()
    for name, p in model.named_parameters():
        frozen = re.search(r"body\.(conv1|bn1|layer1)|transformer\.decoder|query_embed", name) is not None
        assert p.requires_grad != frozen, name
    moved = {
        name for name, b in model.named_buffers() if name.endswith("running_mean") and not torch.equal(b, before[name])
    }
    assert moved and not any(re.search(r"body\.(bn1|layer1)", name) for name in moved)


def test_learned_positions_reach_50_and_beyond_is_a_user_error() -> None:
    assert LearnedPosition(32)(torch.zeros(1, 50, 50, dtype=torch.bool)).shape == (1, 32, 50, 50)
    with pytest.raises(UserError, match="--model.position sine"):
        LearnedPosition(32)(torch.zeros(1, 51, 4, dtype=torch.bool))


def test_backbone_weights_load_from_a_file_and_the_classifier_is_ignored(tmp_path: Path) -> None:
    torch.manual_seed(5)
    imagenet = torchvision.models.resnet18(weights=None)
    torch.save(imagenet.state_dict(), tmp_path / "r18.pth")
    body = Backbone("resnet18").body
    load_backbone_weights(body, "resnet18", str(tmp_path / "r18.pth"))
    assert torch.equal(body.layer4[1].conv2.weight, imagenet.layer4[1].conv2.weight)
    assert torch.equal(body.bn1.running_var, imagenet.bn1.running_var)
    model = small_detr(backbone_weights=str(tmp_path / "r18.pth"))  # as a run builds it
    assert torch.equal(model.backbone[0].body.layer4[1].conv2.weight, imagenet.layer4[1].conv2.weight)


def test_wrong_backbone_weights_are_refused_in_one_sentence(tmp_path: Path) -> None:
    body = Backbone("resnet18").body
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "r34.pth")
    load_backbone_weights(body, "resnet18", str(tmp_path / "r34.pth"))  # a resnet34 holds a resnet18's names
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "r50.pth")
    with pytest.raises(UserError, match="not the weights of a resnet18"):
        load_backbone_weights(body, "resnet18", str(tmp_path / "r50.pth"))
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(UserError, match="not a file of weights"):
        load_backbone_weights(body, "resnet18", str(tmp_path / "page.pth"))
    with pytest.raises(UserError, match="IMAGENET1K_V1"):
        load_backbone_weights(body, "resnet18", "IMAGENET1K_V9")


def test_backbone_weights_are_downloaded_once_checked_by_hash_and_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, kept = Backbone("resnet18").body, tmp_path / "home" / "hub" / "checkpoints"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    content = (tmp_path / "r18.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]

    def published(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        url = (tmp_path / name).as_uri()
        monkeypatch.setattr(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value, "url", url)
        return url

    right = published(f"resnet18-{digest}.pth", content)
    load_backbone_weights(body, "resnet18", "IMAGENET1K_V1")
    (tmp_path / f"resnet18-{digest}.pth").unlink()
    load_backbone_weights(body, "resnet18", "IMAGENET1K_V1")  # from the first download
    (kept / f"resnet18-{digest}.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "ran"), protocol=2))
    with pytest.raises(UserError) as refused:
        load_backbone_weights(body, "resnet18", "IMAGENET1K_V1")
    assert right in str(refused.value) and "delete it" in str(refused.value) and not (tmp_path / "ran").exists()

    for name, words in (("resnet18-00000000.pth", "hash"), ("resnet18-f37072fd.pth", "No such file")):
        url = published(name, content)
        if words != "hash":
            (tmp_path / name).unlink()
        with pytest.raises(UserError) as refused:
            load_backbone_weights(body, "resnet18", "IMAGENET1K_V1")
        said = str(refused.value)
        assert url in said and words in said and str(kept / name) in said and "--model.backbone-weights FILE" in said
        assert "\n" not in said and not (kept / name).exists()


class Hostile:
    """Its pickle makes a folder when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def vary_statistics(model: nn.Module) -> None:
    """Frozen norms that matter, or equal names could be mapped wrongly."""
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            for buffer in (module.weight, module.bias, module.running_mean, module.running_var):
                buffer.uniform_(0.5, 1.0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_outputs_equal_transformers_on_a_padded_batch(name: str) -> None:
    pytest.importorskip("transformers")
    from detr_fabric.benchmark.baseline import transformers_detr

    config = ModelConfig(backbone=name, backbone_weights="none", norm="frozen", **SMALL)
    torch.manual_seed(0)
    model = build_model(config, AttnConfig(), num_classes=5).eval()
    vary_statistics(model)
    baseline = transformers_detr(model, config, num_classes=5).eval()
    batch = noise((96, 128), (128, 80))
    with torch.no_grad():
        ours = model(*batch)
        theirs = baseline(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
    torch.testing.assert_close(ours.pred_logits[-1], theirs.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.pred_boxes[-1], theirs.pred_boxes, rtol=0, atol=1e-4)
    assert float(ours.pred_boxes.std()) > 1e-3


def test_attention_sites_follow_the_attention_config() -> None:
    config = Config(attn=AttnConfig(kind="sparsemax", decoder_self="softmax")).resolve()
    with torch.device("meta"):
        model = build_model(config.model, config.attn, 3)
    layer = model.transformer.decoder.layers[0]
    kinds = (
        model.transformer.encoder.layers[0].self_attn.mapping,
        layer.self_attn.mapping,
        layer.multihead_attn.mapping,
    )
    assert kinds == ("sparsemax", "softmax", "sparsemax")
