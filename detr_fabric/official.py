"""Official DETR files, which hold weights alone: the model that they belong to, and COCO's classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from detr_fabric.config import Config, DataConfig, ModelConfig
from detr_fabric.data.categories import COCO91_CLASSES, Categories
from detr_fabric.data.coco_classes import COCO_CLASSES
from detr_fabric.errors import UserError
from detr_fabric.weights import HEAD, QUERIES, architecture, is_ours

COCO = Categories(tuple(COCO_CLASSES), tuple(COCO_CLASSES.values()), "coco91")


def is_official(content: Any) -> bool:
    """Whether a file is of the original's making: weights of a DETR, and no config."""
    state = content.get("model") if isinstance(content, dict) and not is_ours(content) else None
    return isinstance(state, dict) and {*HEAD, QUERIES} <= state.keys()


def official_config(content: dict[str, Any], path: Path, dc5: bool) -> Config:
    """The resolved config of an official file's model; weights don't show whether it is dilated, `dc5`.

    Files of the original's own training say so themselves, in their command line.
    Raises UserError for a model that this package does not have, and for classes that are not COCO's.
    """
    state: dict[str, Tensor] = content["model"]
    if (width := len(state[HEAD[1]]) - 1) != COCO91_CLASSES:
        raise UserError(
            f"{path}: has {width} classes without names: fine-tune from it (--model.checkpoint {path}) and predict "
            "with what comes of it"
        )
    arguments = content.get("args")
    shown = architecture(state)
    if shown["backbone"] == "unknown" or shown["last_stage"] != "layer4":
        raise UserError(f"{path}: holds a DETR with a backbone that is no ResNet-18, 34, 50 or 101: give another file")
    model = ModelConfig(
        **shown,
        heads=getattr(arguments, "nheads", 8),
        dilation=dc5 or getattr(arguments, "dilation", False),
        num_queries=len(state[QUERIES]),
        norm="frozen",
    )
    return Config(data=DataConfig(root="coco", label_space="coco91"), model=model).resolve()
