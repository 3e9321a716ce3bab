"""What a file holds, checked before it is used: checksums only say that it is as it was written.

Whatever stands in a file, loading it is right or one sentence; a tensor of another shape would corrupt the memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.optim import Optimizer

from detr_fabric.config import Config, DataConfig, Weights
from detr_fabric.data import synthetic
from detr_fabric.data.formats.categories import Categories
from detr_fabric.errors import UserError
from detr_fabric.presets import check_types
from detr_fabric.runtime.run import State

LARGEST_COUNT = 2**53  # which a float64 still counts exactly
RUN_ID = re.compile(r"[^/\\#?%:\n]{1,128}")  # W&B names a folder by it
NOT_OURS = "is missing or not as training writes it; use an earlier checkpoint"
SAME_PARTS = "train the same parts (--model.freeze), or start a new run from its weights with --model.checkpoint"
SIZES = ("world_size", "global_batch", "steps_per_epoch")
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of the shape of their parameter


def weights(state: object, source: str) -> dict[str, Tensor]:
    """A table of named tensors of real numbers. Raises UserError for anything else."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{source}: its model is no table of tensors; use another file")
    for name, value in state.items():
        if not is_dense(value) or not (value.is_floating_point() or name.endswith("num_batches_tracked")):
            raise UserError(f"{source}: its {name!r:.80} is no dense tensor of real numbers; use another file")
    return state


def chosen_weights(content: dict[str, Any], which: Weights | None, source: str) -> tuple[Weights, dict[str, Tensor]]:
    """The weights of a checkpoint of that name; None: those that its run evaluated, which is the moving average where
    there is one (--optim.ema). Raises UserError where it has no such weights."""
    if which == "ema" and "ema" not in content:
        raise UserError(f"{source}: holds no moving average of weights (--optim.ema); leave out --weights ema")
    which = which or ("ema" if "ema" in content else "raw")
    return which, weights(content["ema" if which == "ema" else "model"], source)


def is_dense(value: object) -> bool:
    """Whether it is a tensor whose numbers are all there, in memory and one by one."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def stored_settings(content: dict[str, Any], path: Path) -> tuple[Config, Categories]:
    """The resolved config and the classes that a file of ours holds. Raises UserError for what is neither."""
    try:
        config = check_types(Config.from_dict(content["config"]), "its config").resolve()
        config = replace(config, data=_own_places(config.data))
        categories = Categories.from_dict(content["categories"])
        labels = set(categories.labels.values())
        if not len(labels) == len(categories.names) == len(categories.ids):
            raise ValueError("not one name for each class id")
        if not all(isinstance(name, str) for name in categories.names):
            raise ValueError("a class name is no text")
        if not all(type(id) in (int, str) for id in categories.ids):
            raise ValueError("a class id is neither a number nor a text")
        if not labels <= set(range(categories.num_classes)):
            raise ValueError("a class id lies outside the label space")
        return config, categories
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: its settings or classes are not as training writes them ({reason})") from error


def _own_places(data: DataConfig) -> DataConfig:
    """A file never decides where a command writes: its folder of scenes counts only if they lie there already."""
    folder, sizes = data.shapes_dir, (data.shapes_size, data.shapes_train, data.shapes_val)
    return data if folder is None or synthetic.exist(*sizes, folder) else replace(data, shapes_dir=None)


def check_resumable(content: dict[str, Any], path: Path) -> None:
    """Raises UserError unless a file of ours has everything that a resumed run takes from it, of the right kind.

    What depends on the model is checked where it is loaded: weights by load_model_state, the rest by `moments`.
    """
    stored_settings(content, path)
    for name in ("model", *({"ema"} & content.keys())):
        weights(content[name], str(path))
    state: Any = content.get("state")
    data = "fingerprint" if "fingerprint" in content else "data"
    expected: dict[str, Callable[[Any], bool]] = {
        "optimizer": lambda value: isinstance(value, dict),
        "precision": _is_loss_scale,
        data: lambda value: isinstance(value, str),
        **{name: lambda value: _is_count(value) and value > 0 for name in SIZES},
        **({"augment": lambda value: isinstance(value, str)} if "augment" in content else {}),
    }
    wrong = [name for name, fits in expected.items() if name not in content or not fits(content[name])]
    if not isinstance(state, dict):
        wrong.append("state")
    else:
        kinds = {int: _is_count, float: _is_finite, str | None: _is_text, Tensor | None: _is_row}
        hints = get_type_hints(State)
        wrong += [f"state.{name}" for name, kind in hints.items() if name in state and not kinds[kind](state[name])]
        wrong += [f"state.{name}" for name in ("epoch", "step", "step_in_epoch") if name not in state]
        wrong += ["state.wandb_run_id"] * (RUN_ID.fullmatch(str(state.get("wandb_run_id"))) is None)
    if not wrong and state["step_in_epoch"] > content["steps_per_epoch"]:
        wrong.append("state.step_in_epoch")
    if wrong:
        raise UserError(f"{path}: its {wrong[0]} {NOT_OURS}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < LARGEST_COUNT


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_row(value: object) -> bool:
    return value is None or (is_dense(value) and value.ndim == 1 and value.is_floating_point())  # type: ignore[attr-defined]


def _is_loss_scale(value: object) -> bool:
    """As GradScaler writes it under fp16; empty in other precisions."""
    numbers = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    return isinstance(value, dict) and (
        not value or (value.keys() == set(numbers) and all(_is_finite(value[n]) and value[n] >= 0 for n in numbers))
    )


def moments(stored: dict[str, Any], optimizer: Optimizer, path: Path) -> dict[str, Any]:
    """What `optimizer` is to load: AdamW's moments of a file, each as its parameter lies in memory, under the settings
    that the optimizer has now. Raises UserError unless each moment has the shape and dtype of its parameter."""
    states, groups, fitted = stored.get("state"), stored.get("param_groups"), dict[int, dict[str, Tensor]]()
    parameters = [(group["name"], parameter) for group in optimizer.param_groups for parameter in group["params"]]
    counts = [len(group["params"]) for group in optimizer.param_groups]
    if not isinstance(states, dict) or not isinstance(groups, list) or not all(map(_is_group, groups)):
        raise UserError(f"{path}: its optimizer {NOT_OURS}")
    if [len(group["params"]) for group in groups] != counts:
        raise UserError(f"{path}: its optimizer is of other parts of the model; {SAME_PARTS}")
    if [number for group in groups for number in group["params"]] != [*range(sum(counts))]:  # as PyTorch counts them
        raise UserError(f"{path}: its optimizer {NOT_OURS}")
    for number, (group, parameter) in enumerate(parameters):
        if number in states:
            fitted[number] = _fitted(states[number], parameter, path)
        elif states and group != "alpha":  # which does not learn while softmax trains first
            raise UserError(f"{path}: its optimizer lacks moments; use an earlier checkpoint")
    return {"state": fitted, "param_groups": optimizer.state_dict()["param_groups"]}


def _is_group(value: object) -> bool:
    numbers = value.get("params") if isinstance(value, dict) else None
    return isinstance(numbers, list) and all(type(number) is int for number in numbers)


def _fitted(state: object, parameter: Tensor, path: Path) -> dict[str, Tensor]:
    """The step count and the moments of one parameter, copied: what a file says of strides and sharing is not kept."""
    if not isinstance(state, dict) or state.keys() != {"step", *MOMENTS} or not all(map(is_dense, state.values())):
        raise UserError(f"{path}: its optimizer {NOT_OURS}")
    step = state["step"]
    if step.numel() != 1 or not step.is_floating_point() or not 0 <= float(step) < LARGEST_COUNT:
        raise UserError(f"{path}: its optimizer counts no steps; use an earlier checkpoint")
    for name in MOMENTS:
        if state[name].shape != parameter.shape or state[name].dtype != parameter.dtype:
            raise UserError(
                f"{path}: its optimizer has a moment of {state[name].dtype} {tuple(state[name].shape)} for a parameter "
                f"of {parameter.dtype} {tuple(parameter.shape)}; {SAME_PARTS}"
            )
    with torch.no_grad():
        copies = {name: torch.empty_like(parameter).copy_(state[name]) for name in MOMENTS}
        return {"step": step.reshape(()).float().clone(), **copies}
