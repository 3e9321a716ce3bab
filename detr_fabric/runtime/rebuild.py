"""The model in a file, rebuilt from the file alone: a checkpoint of ours, or an original checkpoint.

Original checkpoints hold weights and no settings: the settings are read off the weights, the classes are COCO's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from detr_fabric.config import Config, DataConfig, ModelConfig, TrainConfig, Weights
from detr_fabric.data.formats.categories import COCO91_CLASSES, Categories
from detr_fabric.errors import UserError
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR
from detr_fabric.presets import check_types
from detr_fabric.runtime.checkpoint import load_model_state, our_checkpoint, read_torch_file
from detr_fabric.runtime.contents import chosen_weights, stored_settings, weights
from detr_fabric.runtime.finetune import HEAD, QUERIES, architecture, check_heads, is_ours
from detr_fabric.runtime.hugging_face import COCO


class Rebuilt(NamedTuple):
    """A model on the CPU, with what belongs to it."""

    path: Path
    model: DETR
    config: Config  # resolved
    categories: Categories
    step: int | None  # optimizer steps that it was trained for; None: an original checkpoint, which does not say
    weights: Weights  # which of the file's: those that training moved, or their moving average


def rebuild(path: Path, dc5: bool = False, which: Weights | None = None) -> Rebuilt:
    """The model of a checkpoint. dc5: an original checkpoint is of a DC5 model, which its weights don't show.

    which: the weights as trained or their moving average; None: those that the run evaluated, see chosen_weights.

    Raises UserError for a file that is no checkpoint, and for one whose parts don't belong together.
    """
    content = read_torch_file(path)
    if is_original(content):
        which, state = chosen_weights({"model": content["model"]}, which, str(path))
        check_heads(state, str(path))
        config = original_config(content, path, dc5)
        return Rebuilt(path, rebuild_model(config, COCO, state, path), config, COCO, None, which)
    content = our_checkpoint(content, path)
    config, categories = stored_settings(content, path)
    if dc5 and not config.model.dilation:
        raise UserError(f"{path}: its model is not dilated; dc5 is for original checkpoints of a DC5 model")
    which, state = chosen_weights(content, which, str(path))
    model = rebuild_model(config, categories, state, path)
    stands = content.get("state")
    step = stands.get("step") if isinstance(stands, dict) else None
    return Rebuilt(path, model, config, categories, step if isinstance(step, int) else None, which)


def rebuild_model(config: Config, categories: Categories, state: dict[str, Tensor], path: Path) -> DETR:
    """A model with the weights `state`. Raises UserError, before anything large is built, where they don't fit."""
    check_heads(weights(state, str(path)), str(path))
    try:
        shown = architecture(state) | {"num_queries": len(state[QUERIES])}
        other = [key for key in shown if shown[key] != getattr(config.model, key)]
        if other:
            raise ValueError(f"its weights have another model.{other[0]}")
        classes, focal = categories.num_classes, config.loss.focal
        model = build_model(config.model, config.attn, classes, pretrained=False, focal=focal)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no model can be built from its settings and weights ({error})") from error
    load_model_state(model, state, str(path))
    return model


def is_original(content: Any) -> bool:
    """Whether a file was written by the original implementation: weights of a DETR, and no config."""
    state = content.get("model") if isinstance(content, dict) and not is_ours(content) else None
    return isinstance(state, dict) and {*HEAD, QUERIES} <= state.keys()


def original_config(content: dict[str, Any], path: Path, dc5: bool) -> Config:
    """The resolved config of an original checkpoint. Weights don't show whether the model is dilated: `dc5` says so,
    or the command line that the original's own training stores.

    Raises UserError for a model that this package does not have, and for classes that are not COCO's.
    """
    state: dict[str, Tensor] = content["model"]
    if (width := len(state[HEAD[1]]) - 1) != COCO91_CLASSES:
        raise UserError(
            f"{path}: has {width} classes without names: fine-tune from it (--model.checkpoint {path}) and use the "
            "checkpoint of that run"
        )
    arguments = content.get("args")
    shown = architecture(state)
    if shown["backbone"] == "unknown" or shown["last_stage"] != "layer4":
        raise UserError(f"{path}: its backbone is no ResNet-18, 34, 50 or 101: give another file")
    try:
        model = ModelConfig(
            **shown,
            heads=getattr(arguments, "nheads", 8),
            dilation=dc5 or getattr(arguments, "dilation", False),
            num_queries=len(state[QUERIES]),
            norm="frozen",
        )
        data, train = DataConfig(root="coco", label_space="coco91"), TrainConfig(name=path.stem)
        return check_types(Config(data=data, model=model, train=train), "its command line").resolve()
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: no settings can be read off it ({reason}); give another file") from error
