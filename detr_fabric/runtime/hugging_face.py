"""Reads a folder of Hugging Face's transformers that holds a DETR as if it were a checkpoint of ours.

config.json, model.safetensors and, where it is there, preprocessor_config.json: as published (facebook/detr-resnet-50,
microsoft/conditional-detr-resnet-50), as transformers saves them, or as `detr_fabric.export --format transformers`
writes them. No code in a folder is run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from detr_fabric.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from detr_fabric.data.batch import IMAGENET_MEAN, IMAGENET_STD
from detr_fabric.data.formats.categories import COCO91_CLASSES, Categories, normalized
from detr_fabric.data.formats.coco_classes import COCO_CLASSES
from detr_fabric.errors import UserError
from detr_fabric.model.build import build_model
from detr_fabric.presets import check_types
from detr_fabric.runtime.hugging_face_names import BASIC, DEPTHS, FAMILIES, LOSS, from_hugging_face

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
OURS = "detr_fabric"  # the field of config.json with what transformers' own fields can't say
COCO = Categories(tuple(COCO_CLASSES), tuple(COCO_CLASSES.values()), "coco91")
SIZES = (800, 1333)  # transformers' shortest and longest edge where a folder names none
Fields = dict[str, Any]


def read_folder(folder: Path) -> dict[str, Any]:
    """The weights, config and categories of a folder, as a checkpoint of ours holds them.

    Raises UserError for a folder without them, for damaged files, and for a model that this package does not have.
    """
    own_file = folder / "best.ckpt" if (folder / "best.ckpt").is_file() else "a .ckpt file"  # of the folder of a run
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: a folder without {name}: give {own_file}, or a folder of transformers with {CONFIG} and "
                f"{WEIGHTS}"
            )
    fields, weights = read_json(folder / CONFIG), read_weights(folder / WEIGHTS)
    check_model(fields, folder)
    sizes = preparation(folder)
    try:
        categories = classes(fields)
        config = settings(fields, sizes, categories, folder.absolute().name)
        if config.model.enc_layers + config.model.dec_layers > len(weights):
            raise ValueError("fewer weights than layers")
        with torch.device("meta"):
            width, focal = categories.num_classes, config.loss.focal
            own = build_model(config.model, config.attn, width, pretrained=False, focal=focal).state_dict()
        state = from_hugging_face(weights, own)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: can't be read as a DETR of transformers ({reason}); use another folder") from error
    return {"model": state, "config": config.to_dict(), "categories": categories.to_dict()}


def read_json(path: Path) -> Fields:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error}); use another folder") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings; use another folder")
    return content


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in float32. A format of numbers alone: nothing in it can be run."""
    try:
        return {name: value.float() for name, value in load_file(path).items()}
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: can't be read as weights ({reason}); download it again") from error


def check_model(fields: Fields, folder: Path) -> None:
    """Raises UserError for a model that this package does not have, with what it lacks."""
    if (kind := fields.get("model_type")) not in list(FAMILIES):
        raise UserError(f"{folder}: its model is {kind!r:.80}, not one of {', '.join(FAMILIES)}")
    if "Segmentation" in str(fields.get("architectures")):
        raise UserError(f"{folder}: its model is for segmentation; give one for object detection")
    expected: Fields = {
        "activation_function": "relu",
        "num_channels": 3,
        "auxiliary_loss": False,  # transformers then norms between decoder layers: another model
        "decoder_attention_heads": fields.get("encoder_attention_heads", 8),
        "decoder_ffn_dim": fields.get("encoder_ffn_dim", 2048),
    }
    check(fields, expected, folder / CONFIG, "use another folder")


def check(fields: Fields, expected: Fields, path: Path, cure: str) -> None:
    for name, value in expected.items():
        if (found := fields.get(name, value)) != value:
            raise UserError(f"{path}: {name} is {found!r:.80}, this package has only {value!r}; {cure}")


def preparation(folder: Path) -> tuple[int, int]:
    """The shorter side to which images are resized, and the most that the longer one may have.

    Raises UserError for images that are prepared otherwise than this package prepares them.
    """
    path = folder / PROCESSOR
    if not path.is_file():
        return SIZES
    fields = read_json(path)
    cure = f"without {PROCESSOR} it is read with {SIZES[0]} and {SIZES[1]}"
    expected: Fields = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    check(fields, {**expected, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}, path, cure)
    size = fields.get("size", {})
    if isinstance(size, int):  # of earlier versions
        size = {"shortest_edge": size, "longest_edge": fields.get("max_size", SIZES[1])}
    match size:
        case {"max_height": int(side), "max_width": other} if side == other:
            return side, side
        case {"shortest_edge": int(shortest)}:
            longest = size.get("longest_edge", fields.get("max_size", SIZES[1]))
            if isinstance(longest, int):
                return shortest, longest
        case {"longest_edge": int(longest)}:
            return longest, longest
        case {} if not size:
            return SIZES
    raise UserError(f"{path}: size is {size!r:.120}, this package has only shortest_edge and longest_edge; {cure}")


def classes(fields: Fields) -> Categories:
    """COCO's where the names say so, else one class a label; of a folder of ours also the data set's own ids."""
    given: dict[str, Any] = fields["id2label"]
    names = [str(given[str(label)]) for label in range(len(given))]
    stored = fields.get(OURS, {}).get("categories")
    if stored is not None:
        own = Categories.from_dict(stored)
        if [own.name(label) for label in range(own.num_classes)] == names:  # it was not trained on others since
            return own
    same = all(normalized(names[label]) == name for label, name in COCO_CLASSES.items() if label < len(names))
    if len(names) == COCO91_CLASSES and same:
        return COCO
    return Categories(tuple(range(len(names))), tuple(names))


def settings(fields: Fields, sizes: tuple[int, int], categories: Categories, name: str) -> Config:
    """The resolved config of a folder's model."""
    backbone, last_stage, dilation = convolutions(fields)
    family = FAMILIES[fields["model_type"]]
    conditional = family == "ConditionalDetr"
    stored = fields.get(OURS, {}).get("attn", {})
    loss: dict[str, Any] = {ours: float(fields[theirs]) for theirs, ours in LOSS.items() if theirs in fields}
    config = Config(
        data=DataConfig(root="coco", label_space=categories.label_space, scales=(sizes[0],), max_size=max(sizes)),
        model=ModelConfig(
            backbone=backbone,  # type: ignore[arg-type]  # checked below
            last_stage=last_stage,  # type: ignore[arg-type]
            dilation=dilation,
            norm="frozen",
            position=fields.get("position_embedding_type", "sine"),
            hidden_dim=fields.get("d_model", 256),
            heads=fields.get("encoder_attention_heads", 8),
            enc_layers=fields.get("encoder_layers", 6),
            dec_layers=fields.get("decoder_layers", 6),
            dim_feedforward=fields.get("encoder_ffn_dim", 2048),
            dropout=fields.get("dropout", 0.1),
            num_queries=fields.get("num_queries", 100),
            cross_attention="conditional" if conditional else "original",
            pre_norm=family == "TableTransformer",
        ),
        attn=Config.from_dict({"attn": stored}).attn,
        loss=LossConfig(kind="focal" if conditional else "softmax", **loss),
        train=TrainConfig(name=re.sub(r"[/\\]", "_", name) or None),
    )
    return check_types(config, CONFIG).resolve()


def convolutions(fields: Fields) -> tuple[str, str, bool]:
    """Backbone, last stage and dilation, of transformers' own ResNet or of timm's."""
    inner = fields.get("backbone_config")
    if inner is None and not fields.get("use_timm_backbone", True):
        inner = {"model_type": "resnet"}
    if inner is None or inner["model_type"] == "timm_backbone":
        name, own = (inner or fields).get("backbone") or "resnet50", inner or fields.get("backbone_kwargs") or {}
        dilation = bool(fields.get("dilation")) or own.get("output_stride") == 16
        return name.partition(".")[0], f"layer{max(own.get('out_indices') or [4])}", dilation
    unusual = [key for key in ("downsample_in_first_stage", "downsample_in_bottleneck") if inner.get(key)]
    if inner["model_type"] != "resnet" or unusual or inner.get("hidden_act", "relu") != "relu":
        raise ValueError(f"its backbone is no usual ResNet: {', '.join(unusual) or inner['model_type']}")
    depths, basic = list(inner.get("depths", DEPTHS["resnet50"])), inner.get("layer_type") == "basic"
    stages = [int(name.removeprefix("stage")) for name in inner.get("out_features") or []]
    last = max(stages or [len(depths)])
    for name, known in DEPTHS.items():
        if known[:last] == depths[:last] and basic == (name in BASIC):
            return name, f"layer{last}", False
    raise ValueError(f"its backbone has stages of {depths} blocks, which no ResNet-18, 34, 50 or 101 has")
