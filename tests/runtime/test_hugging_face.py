"""Folders of transformers are read as checkpoints: as published, as saved by transformers; damaged ones are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detr_fabric import load
from detr_fabric.config import AttnConfig, Config, LossConfig, ModelConfig
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.formats.coco_classes import COCO_CLASSES
from detr_fabric.errors import UserError
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR
from detr_fabric.runtime.checkpoint import load_checkpoint, read_torch_file
from detr_fabric.runtime.finetune import load_weights
from detr_fabric.runtime.hugging_face_names import architecture_fields, to_hugging_face
from detr_fabric.runtime.rebuild import COCO, rebuild

SMALL = dict(hidden_dim=32, heads=4, enc_layers=1, dec_layers=2, dim_feedforward=64, num_queries=7, norm="frozen")
PUBLISHED = {  # of facebook/detr-resnet-50, as far as the sizes are not changed below
    "architectures": ["DetrForObjectDetection"],
    "model_type": "detr",
    "activation_function": "relu",
    "auxiliary_loss": False,
    "backbone": "resnet50",
    "backbone_config": None,
    "use_timm_backbone": True,
    "use_pretrained_backbone": True,
    "dilation": False,
    "dropout": 0.1,
    "encoder_layerdrop": 0.0,
    "num_channels": 3,
    "position_embedding_type": "sine",
    "scale_embedding": False,
}
PROCESSOR = {
    "feature_extractor_type": "DetrFeatureExtractor",
    "format": "coco_detection",
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "max_size": 1333,
    "size": 800,
}


def small_model(num_classes: int, **changes: Any) -> DETR:
    torch.manual_seed(0)
    config = Config(model=ModelConfig(**{"backbone": "resnet18", **SMALL, **changes})).resolve()
    conditional = config.model.cross_attention == "conditional"
    model = build_model(config.model, config.attn, num_classes, pretrained=False, focal=conditional)
    for p in model.bbox_embed.parameters():
        nn.init.normal_(p, std=0.3)  # those of a fresh conditional model are 0
    return model.eval()


def write(folder: Path, model: DETR, names: dict[int, str], fields: dict[str, Any], timm: bool) -> Path:
    folder.mkdir(exist_ok=True)
    sizes = architecture_fields(ModelConfig(**{"backbone": "resnet18", **SMALL}))  # type: ignore[arg-type]
    sizes = {key: sizes[key] for key in sizes if re.search("layers|heads|ffn|d_model|num_queries", key)}
    content = {**PUBLISHED, "backbone": "resnet18", **sizes, "id2label": names, **fields}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    state = {name: value.clone() for name, value in to_hugging_face(model.state_dict(), timm).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DETR]:
    names = {label: COCO_CLASSES.get(label, "N/A") for label in range(91)} | {12: "street sign"}
    model = small_model(91)
    return write(tmp_path_factory.mktemp("hub") / "detr-resnet-18", model, names, {}, timm=True), model


def same_outputs(one: DETR, other: DETR) -> bool:
    images, mask = torch.randn(2, 3, 64, 70), torch.zeros(2, 64, 70, dtype=torch.bool)
    mask[1, 40:] = True
    with torch.no_grad():
        pairs = zip(one(images, mask), other.eval()(images, mask), strict=True)
        return all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in pairs)


def test_a_published_folder_is_rebuilt_with_cocos_classes_and_sizes(published: tuple[Path, DETR]) -> None:
    folder, model = published
    rebuilt = rebuild(folder)
    assert same_outputs(model, rebuilt.model) and rebuilt.categories == COCO and rebuilt.step is None
    data = rebuilt.config.data
    assert (data.label_space, data.scales, data.max_size) == ("coco91", (800,), 1333)
    assert rebuilt.config.model.norm == "frozen" and rebuilt.config.attn.mappings == ("softmax",) * 3
    found = load(folder, "cpu")(torch.zeros(3, 64, 64, dtype=torch.uint8), threshold=0.0)
    assert len(found.names) == 7


def test_a_published_conditional_detr_is_rebuilt_with_focal_loss_and_fine_tuned(tmp_path: Path) -> None:
    names = {label: COCO_CLASSES.get(label, "N/A") for label in range(91)}
    model = small_model(91, cross_attention="conditional")
    fields = {
        "architectures": ["ConditionalDetrForObjectDetection"],
        "model_type": "conditional_detr",
        "class_cost": 2,
        "cls_loss_coefficient": 2,
        "focal_alpha": 0.25,
    }
    folder = write(tmp_path / "conditional-detr-resnet-18", model, names, fields, timm=True)
    stored = load_file(folder / "model.safetensors")
    for name in ("sa_qcontent_proj", "sa_kpos_proj", "sa_v_proj", "ca_kcontent_proj", "ca_qpos_sine_proj", "fc1"):
        assert f"model.decoder.layers.0.{name}.weight" in stored, name  # as in microsoft/conditional-detr-resnet-50
    edit(folder, "preprocessor_config.json", feature_extractor_type="ConditionalDetrFeatureExtractor")
    rebuilt = rebuild(folder)
    assert same_outputs(model, rebuilt.model) and rebuilt.categories == COCO
    assert rebuilt.config.model.cross_attention == "conditional"
    assert rebuilt.config.loss == LossConfig(kind="focal", cost_class=2, ce_coef=2)
    assert (rebuilt.config.data.scales, rebuilt.config.data.max_size) == ((800,), 1333)
    ours = small_model(2, cross_attention="conditional")
    lines = load_weights(ours, str(folder), Categories((1, 2), ("robot", "Cat")))
    assert "1 of 2 classes carried over by name: Cat; new: robot" in "\n".join(lines)
    torch.testing.assert_close(ours.class_embed.weight[1], model.class_embed.weight[17])


@pytest.mark.process
@pytest.mark.parametrize(
    "kind, changes",
    [("Detr", {}), ("TableTransformer", {"pre_norm": True}), ("ConditionalDetr", {"cross_attention": "conditional"})],
)
def test_what_transformers_saves_is_read_whatever_its_names_and_finds_the_same(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = small_model(3, position="learned", **changes)
    sizes: dict[str, Any] = {"backbone": "resnet18", **SMALL, "position": "learned", **changes}
    fields = architecture_fields(ModelConfig(**sizes))
    config = getattr(transformers, f"{kind}Config")(**fields, id2label={0: "a", 1: "b", 2: "c"})
    theirs, report = getattr(transformers, f"{kind}ForObjectDetection").from_pretrained(
        None, config=config, state_dict=to_hugging_face(model.state_dict()), output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs.save_pretrained(tmp_path / kind)
    inside = tmp_path / f"{kind}_inside"  # the names of its own modules, which other versions may save
    inside.mkdir()
    (inside / "config.json").write_text((tmp_path / kind / "config.json").read_text())
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, inside / "model.safetensors")
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = True
    images[1, :, :, 64:] = 0
    with torch.no_grad():
        expected = theirs.eval()(pixel_values=images, pixel_mask=(~mask).long())
    for folder in (tmp_path / kind, inside):
        rebuilt = rebuild(folder)
        assert same_outputs(model, rebuilt.model) and rebuilt.categories == Categories((0, 1, 2), ("a", "b", "c"))
        assert rebuilt.config.data.scales == (800,)  # as transformers does without preprocessor_config.json
        with torch.no_grad():
            found = rebuilt.model(images, mask)
        torch.testing.assert_close(found.pred_logits[-1], expected.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.pred_boxes[-1], expected.pred_boxes, rtol=0, atol=1e-4)


def test_fine_tuning_takes_the_rows_of_classes_of_the_same_name(published: tuple[Path, DETR]) -> None:
    folder, model = published
    ours = small_model(2)
    lines = load_weights(ours, str(folder), Categories((1, 2), ("robot", "Cat")))
    assert "1 of 2 classes and no-object carried over by name: Cat; new: robot" in "\n".join(lines)
    torch.testing.assert_close(ours.class_embed.weight[1:], model.class_embed.weight[[17, 91]])
    torch.testing.assert_close(ours.transformer.state_dict(), model.transformer.state_dict())
    with pytest.raises(UserError, match=r"model\.backbone is resnet18 there and resnet34 here"):
        load_weights(small_model(2, backbone="resnet34"), str(folder), Categories((1, 2), ("robot", "Cat")))


def test_dilated_backbones_of_timm_are_known_by_either_setting(published: tuple[Path, DETR], tmp_path: Path) -> None:
    model = small_model(2, dilation=True)
    inner = {"model_type": "timm_backbone", "backbone": "resnet18.a1_in1k", "out_indices": [1, 2, 3, 4]}
    for fields in ({"dilation": True}, {"backbone_config": {**inner, "output_stride": 16}}):
        rebuilt = rebuild(write(tmp_path / "dc5", model, {0: "a", 1: "b"}, fields, timm=True))
        assert rebuilt.config.model.dilation and same_outputs(model, rebuilt.model)


def test_code_in_a_folder_is_never_run(published: tuple[Path, DETR], tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    fields = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForObjectDetection": "evil.Model"}}
    rebuild(write(tmp_path, small_model(1), {0: "a"}, fields, timm=True))
    assert not (tmp_path / "run").exists()


def edit(folder: Path, name: str = "config.json", **changes: object) -> None:
    fields = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(fields | changes))


def tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


HEAD = "class_labels_classifier.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda at: (at / "config.json").unlink(), "a folder without config.json"),
    "no weights": (lambda at: (at / "model.safetensors").unlink(), "a folder without model.safetensors"),
    "no JSON": (lambda at: (at / "config.json").write_text("{"), "config.json: can't be read as JSON"),
    "a list": (lambda at: (at / "config.json").write_text("[]"), "config.json: holds no settings"),
    "cut off": (lambda at: (at / "model.safetensors").write_bytes(b"\x08" * 99), "can't be read as weights"),
    "another model": (lambda at: edit(at, model_type="yolos"), "its model is 'yolos', not one of detr"),
    "segmentation": (lambda at: edit(at, architectures=["DetrForSegmentation"]), "is for segmentation"),
    "auxiliary loss": (lambda at: edit(at, auxiliary_loss=True), "auxiliary_loss is True"),
    "gelu": (lambda at: edit(at, activation_function="gelu"), "activation_function is 'gelu'"),
    "a backbone": (lambda at: edit(at, backbone="efficientnet_b0"), "can't be read as a DETR .*efficientnet"),
    "other depths": (lambda at: edit(at, backbone="resnet50"), r"can't be read as a DETR .*missing and \d+ unknown"),
    "too many layers": (lambda at: edit(at, encoder_layers=10**9), "fewer weights than layers"),
    "no width": (lambda at: edit(at, d_model="wide"), "can't be read as a DETR"),
    "no classes": (lambda at: edit(at, id2label={}), "can't be read as a DETR|does not fit"),
    "fewer classes": (lambda at: edit(at, id2label={"0": "a"}), "does not fit this model"),
    "gaps": (lambda at: edit(at, id2label={"0": "a", "2": "b"}), "can't be read as a DETR"),
    "a lost tensor": (lambda at: tensors(at, lambda state: state.pop(HEAD)), "1 of its model's weights are missing"),
    "a tensor more": (lambda at: tensors(at, lambda state: state.update(x=torch.ones(1))), "1 unknown, first: x"),
    "integers": (
        lambda at: tensors(at, lambda state: state.update({HEAD: torch.ones(2, 2).int()})),
        "does not fit|DETR",
    ),
    "other pixels": (lambda at: edit(at, "preprocessor_config.json", image_mean=[0.5] * 3), "image_mean is .*without"),
    "squares": (
        lambda at: edit(at, "preprocessor_config.json", size={"height": 640, "width": 640}),
        "size is .*this package has only shortest_edge",
    ),
    "our own, changed": (lambda at: edit(at, detr_fabric={"attn": {"kind": "hardmax"}}), "can't be read as a DETR"),
    "our own, damaged": (lambda at: edit(at, detr_fabric=[1]), "can't be read as a DETR"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_or_foreign_folder_is_one_sentence(name: str, published: tuple[Path, DETR], tmp_path: Path) -> None:
    for path in published[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fault, sentence = FAULTS[name]
    fault(tmp_path)
    with pytest.raises(UserError, match=sentence) as refused:
        rebuild(tmp_path)
    assert str(refused.value).startswith(str(tmp_path)) and "\n" not in str(refused.value)


def test_a_folder_cannot_be_resumed_and_a_runs_folder_is_no_such_folder(
    published: tuple[Path, DETR], tmp_path: Path
) -> None:
    assert "state" not in load_checkpoint(published[0])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"a folder without model\.safetensors: give a \.ckpt file"):
        read_torch_file(tmp_path)


def test_sizes_of_other_kinds_are_understood(published: tuple[Path, DETR], tmp_path: Path) -> None:
    for path in published[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for size, expected in (
        ({"shortest_edge": 480, "longest_edge": 600}, (480, 600)),
        ({"max_height": 480, "max_width": 480}, (480, 480)),
        ({"longest_edge": 800}, (800, 800)),
    ):
        edit(tmp_path, "preprocessor_config.json", size=size)
        data = rebuild(tmp_path).config.data
        assert (data.scales, data.max_size) == ((expected[0],), expected[1])


def test_attention_of_a_folder_of_ours_goes_by_its_own_field(published: tuple[Path, DETR], tmp_path: Path) -> None:
    names = {0: "a", 1: "b"}
    own = {
        "attn": {"kind": "sparsemax", "alpha_range": [1.0, 2.0]},
        "categories": Categories((5, 9), ("a", "b")).to_dict(),
    }
    folder = write(tmp_path, small_model(2), names, {"model_type": "sparse-detr", "detr_fabric": own}, timm=True)
    rebuilt = rebuild(folder)
    assert rebuilt.config.attn.mappings == AttnConfig("sparsemax").mappings and rebuilt.categories.ids == (5, 9)
    edit(folder, id2label={"0": "b", "1": "a"})  # trained on others since
    assert rebuild(folder).categories == Categories((0, 1), ("b", "a"))
