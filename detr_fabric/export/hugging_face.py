"""A DETR as a folder for Hugging Face's transformers, and what transformers finds with it.

Shapes: B batch, H×W image, Q queries.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from detr_fabric.analysis.capture import unwrap
from detr_fabric.config import Config
from detr_fabric.data.batch import IMAGENET_MEAN, IMAGENET_STD
from detr_fabric.errors import UserError
from detr_fabric.export.graph import Run
from detr_fabric.export.transformers_attention import FILE, NAME, source
from detr_fabric.model.mappings import MAPPINGS
from detr_fabric.predict.detector import Detector
from detr_fabric.runtime.hugging_face import CONFIG, OURS, PROCESSOR, WEIGHTS
from detr_fabric.runtime.hugging_face_names import (
    FAMILIES,
    LOSS,
    architecture_fields,
    model_type,
    newest,
    to_hugging_face,
)

FILES = (CONFIG, WEIGHTS, PROCESSOR, FILE)


def refuse(detector: Detector) -> None:
    """Raises UserError for what transformers' DETR and Conditional DETR can't be."""
    config = detector.config
    conditional = config.model.cross_attention == "conditional"
    sparse = [mapping for mapping in dict.fromkeys(config.attn.mappings) if mapping != "softmax"]
    reasons = {
        "its Conditional DETR scores each class with a sigmoid and has no row for no-object, as --loss.kind focal": (
            conditional and not config.loss.focal
        ),
        "its Conditional DETR has no --model.pre-norm": conditional and config.model.pre_norm,
        "its Conditional DETR has weights for a second decoder layer, --model.dec-layers 1 has none": (
            conditional and config.model.dec_layers == 1
        ),
        "its DETR has a row for no-object in the class head, this one has none": (
            config.loss.focal and not conditional
        ),
        "--attn.decoder-cross tvmax needs the grid of the features, which its attention is not told": "tvmax" in sparse,
        "the alphas that entmax-learned learns have no place among its weights": any(
            MAPPINGS[mapping].learned for mapping in sparse
        ),
        f"its only DETR with --model.pre-norm, the Table Transformer, has softmax and not {'/'.join(sparse)}": bool(
            sparse and config.model.pre_norm
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"transformers can't hold this model: {reason}; use --format onnx or torch")
    if config.model.dilation and find_spec("timm") is None:
        raise UserError("transformers has --model.dilation only with timm's backbones: pip install timm")


def write_folder(detector: Detector, folder: Path) -> None:
    """config.json, model.safetensors, preprocessor_config.json and, for other mappings than softmax, the file that
    registers them. Raises OSError where they can't be written."""
    config = detector.config
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((CONFIG, model_fields(detector)), (PROCESSOR, processor_fields(detector))):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    state = to_hugging_face(unwrap(detector.model).state_dict(), config.model.dilation)
    if is_sparse(config):
        state = {newest(name): value for name, value in state.items()}  # a new model has no older names
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    (folder / WEIGHTS).write_bytes(save(copies, metadata={"format": "pt"}))  # save_file would let nobody else read it
    if is_sparse(config):
        (folder / FILE).write_text(source(config), encoding="utf-8")


def move(temporary: Path, folder: Path) -> None:
    """Gives the files of a folder their place in another, each whole or not at all; other files there stay."""
    folder.mkdir(exist_ok=True)
    for name in FILES:
        if (temporary / name).is_file():
            os.replace(temporary / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)  # the code of an earlier, sparse model


def how_to_load(config: Config, folder: Path) -> str:
    trust = ", trust_remote_code=True" if is_sparse(config) else ""
    return f'load it with AutoModelForObjectDetection.from_pretrained("{folder}"{trust})'


def is_sparse(config: Config) -> bool:
    return {*config.attn.mappings} != {"softmax"}


def model_fields(detector: Detector) -> dict[str, Any]:
    """config.json."""
    config, categories = detector.config, detector.categories
    names = [categories.name(label) for label in range(categories.num_classes)]
    kind = model_type(config.model, is_sparse(config))
    model_class = f"{FAMILIES[kind]}ForObjectDetection"
    weights = {theirs: getattr(config.loss, ours) for theirs, ours in LOSS.items()}
    training = ("softmax_first", "recompute", "fused")
    attn = {key: value for key, value in asdict(config.attn).items() if key not in training}
    module = FILE.removesuffix(".py")
    own = {
        "attn_implementation": NAME,
        "auto_map": {
            "AutoConfig": f"{module}.SparseDetrConfig",
            "AutoModelForObjectDetection": f"{module}.{model_class}",
        },
    }
    return {
        "architectures": [model_class],
        "model_type": kind,
        **(own if is_sparse(config) else {}),
        **architecture_fields(config.model),
        "auxiliary_loss": False,  # with it transformers norms between decoder layers, also in evaluation
        **{key: int(value) for key, value in weights.items() if value == int(value)},  # they are whole numbers there
        "eos_coefficient": float(config.loss.eos_coef),
        "id2label": dict(enumerate(names)),
        "label2id": {name: label for label, name in reversed([*enumerate(names)])},
        OURS: {"attn": attn, "categories": categories.to_dict()},
    }


def processor_fields(detector: Detector) -> dict[str, Any]:
    """preprocessor_config.json."""
    conditional = detector.config.model.cross_attention == "conditional"
    return {
        "image_processor_type": "ConditionalDetrImageProcessor" if conditional else "DetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": detector.scale, "longest_edge": detector.max_size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "do_pad": True,
    }


def open_folder(folder: Path) -> Run:
    """What transformers finds with a folder, its own way from pixels to boxes except that it does not resize."""
    from transformers import AutoImageProcessor, AutoModelForObjectDetection
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if (folder / FILE).is_file():
            import_file(folder / FILE)
        processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model, report = AutoModelForObjectDetection.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    best = {"top_k": 1} if "conditional" in model.config.model_type else {}

    def run(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [(int((~padding[:, 0]).sum()), int((~padding[0]).sum())) for padding in mask]
        alone = [image[:, :height, :width].contiguous() for image, (height, width) in zip(images, sizes, strict=True)]
        size = {"height": images.shape[-2], "width": images.shape[-1]}
        inputs = processor(images=alone, do_resize=False, pad_size=size, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        # each query as an image of its own, because Conditional DETR keeps the best of an image's queries and classes
        queries = {key: outputs[key].flatten(0, 1)[:, None] for key in ("logits", "pred_boxes")}
        found = processor.post_process_object_detection(type(outputs)(**queries), threshold=-1.0, **best)
        scores, labels, boxes = (
            torch.cat([query[key] for query in found]).unflatten(0, (len(images), -1))
            for key in ("scores", "labels", "boxes")
        )
        return scores, labels, boxes

    return run


def import_file(path: Path) -> None:
    """Imports a folder's own file, as its user would."""
    spec = spec_from_file_location(f"{path.parent.name}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where transformers looks for the module of a class
    spec.loader.exec_module(module)
