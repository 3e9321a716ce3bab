"""What a model starts from: weights of an original checkpoint or one of ours, fitted to other classes and queries.

Rows of the class head go by the name of their class; all else must be there, in the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detr_fabric.config import AttnConfig, Config
from detr_fabric.data.formats.categories import COCO91_CLASSES, Categories, by_alias, listed, normalized
from detr_fabric.data.formats.coco_classes import COCO_CLASSES
from detr_fabric.errors import UserError
from detr_fabric.model.attention import Attention
from detr_fabric.model.conditional import REFERENCE
from detr_fabric.model.detr import DETR
from detr_fabric.model.mappings import is_learned_by_a_mapping
from detr_fabric.runtime.checkpoint import load_model_state, read_weights
from detr_fabric.runtime.contents import chosen_weights, stored_settings

State = dict[str, Tensor]
Rows = list[int | None]  # for each row of this model the row of the file that it gets; None: it stays fresh

HEAD = ("class_embed.weight", "class_embed.bias")  # (C+1, D), (C+1): the last row is "no object"; focal loss has none
QUERIES = "query_embed.weight"  # (Q, D)


def load_weights(model: DETR, source: str, categories: Categories, aliases: Sequence[str] = ()) -> list[str]:
    """Weights at a path or URL → a freshly built model for `categories`. Returns lines that say what was carried over.
    Of a checkpoint of ours they are those that its run evaluated: the moving average, where there is one.

    aliases: NAME=OTHER, names of classes in the file that differ from those of `categories`.

    Raises UserError when the file can't be had or is of another architecture, and when model.freeze would keep from
    training what stays fresh.
    """
    flag = f"--model.checkpoint {source}"
    content, state = read_weights(source)
    which, state = chosen_weights(content, None, flag) if is_ours(content) else ("raw", state)
    own = model.state_dict()
    check_heads(state, flag)
    config, known = stored_settings(content, Path(source)) if is_ours(content) else (None, None)
    focal = config is not None and config.loss.focal
    width, queries = len(state[HEAD[1]]) - (not focal), len(state[QUERIES])
    check_architecture(state, hidden_settings(content, config, source), model, flag)
    if not same_alpha_range(config, model):  # a logit means another alpha there
        state = {name: value for name, value in state.items() if not is_learned_by_a_mapping(name)}
    if known is not None and known.num_classes != width:
        raise UserError(f"{flag}: its class head has {width} classes, its categories are others; use another file")

    names = class_names(known, width)
    rows = head_rows(names, width, categories, aliases)
    head = {name: as_trained_here(state[name], focal, model.focal) for name in HEAD}
    query_rows: Rows = [row if row < queries else None for row in range(len(own[QUERIES]))]
    fitted = {name: value for name, value in state.items() if name in own or not is_optional(name)}
    fitted |= {name: value for name, value in own.items() if name not in state and is_optional(name)}
    fitted |= {name: carry_over(own[name], head[name], rows if model.focal else [*rows, width]) for name in HEAD}
    fitted[QUERIES] = carry_over(own[QUERIES], state[QUERIES], query_rows)
    load_model_state(model, fitted, flag)

    for part, fresh, parameter in (("heads", rows, HEAD[0]), ("decoder", query_rows, QUERIES)):
        if None in fresh and not model.get_parameter(parameter).requires_grad:
            what = "classes" if part == "heads" else "queries"
            raise UserError(f"{flag}: --model.freeze {part} would leave its new {what} untrained; do not freeze {part}")
    return [
        f"weights backbone, encoder, decoder and box head from {source}{' (moving average)' * (which == 'ema')}",
        head_line(names, rows, categories, model.focal),
        f"queries {min(queries, len(query_rows))} of {len(query_rows)} carried over",
        *alpha_line(state, own),
    ]


def same_alpha_range(theirs: Config | None, model: DETR) -> bool:
    ours = next(module.attn.alpha_range for module in model.modules() if isinstance(module, Attention))
    return (AttnConfig() if theirs is None else theirs.attn).alpha_range == ours


def is_optional(name: str) -> bool:
    """Whether the file or the model may lack this tensor: learned alphas, and a count of trained batch norm."""
    return is_learned_by_a_mapping(name) or name.endswith("num_batches_tracked")


def is_ours(content: dict[str, Any]) -> bool:
    return {"config", "categories", "version"} <= content.keys()


def class_names(categories: Categories | None, width: int) -> dict[int, str] | None:
    """Label → class name of a file, as far as it has names; None: nothing is known about its classes."""
    if categories is not None:
        return dict(zip(categories.labels.values(), categories.names, strict=True))
    return COCO_CLASSES if width == COCO91_CLASSES else None


def head_rows(names: dict[int, str] | None, width: int, categories: Categories, aliases: Sequence[str] = ()) -> Rows:
    """The row of the file for each class of the model: that of its alias, or of the same name, whatever its case and
    underscores.

    In files without names all rows are the model's if they are as many, else none. Labels that COCO's numbering leaves
    unused have no name, and go by their number.
    """
    if names is None:
        return [label if width == categories.num_classes else None for label in range(categories.num_classes)]
    by_name = {normalized(name): label for label, name in reversed(names.items())}
    wanted = dict(zip(categories.labels.values(), categories.names, strict=True))
    rows: Rows = []
    for label in range(categories.num_classes):
        name = normalized(by_alias(wanted[label], aliases)) if label in wanted else None
        if name is None:
            rows.append(label if width == COCO91_CLASSES else None)
        else:
            rows.append(label if normalized(names.get(label, "")) == name else by_name.get(name))
    return rows


def as_trained_here(theirs: Tensor, focal: bool, here: bool) -> Tensor:
    """Rows of a class head, trained with focal loss or softmax, for a model that has focal loss (`here`) or softmax.

    Focal loss trains log-odds of a class against nothing, which are softmax's logit less that of "no object".
    """
    if focal == here:
        return theirs
    return torch.cat([theirs, torch.zeros_like(theirs[:1])]) if focal else theirs[:-1] - theirs[-1:]


def carry_over(own: Tensor, theirs: Tensor, rows: Rows) -> Tensor:
    """A copy of `own` with the rows of `theirs` that are to replace its own."""
    result = own.clone()
    for row, their_row in enumerate(rows):
        if their_row is not None:
            result[row] = theirs[their_row]
    return result


def head_line(names: dict[int, str] | None, rows: Rows, categories: Categories, focal: bool) -> str:
    labels = categories.labels.values()
    kept = [categories.name(label) for label in labels if rows[label] is not None]
    new = [categories.name(label) for label in labels if rows[label] is None]
    how = "by name" if names is not None else "by number (the weights name no classes)"
    line = f"head    {len(kept)} of {len(labels)} classes{'' if focal else ' and no-object'} carried over"
    line += f" {how}: {listed(kept)}" if kept else ""
    return f"{line}; new: {listed(new)}" if new else line


def alpha_line(state: State, own: State) -> list[str]:
    """What became of learned alphas, where the file or the model has any."""
    theirs, ours = (set(filter(is_learned_by_a_mapping, tensors)) for tensors in (state, own))
    parts = [
        f"learned alphas of {len(blocks)} attention blocks {what}"
        for blocks, what in (
            (ours & theirs, "carried over"),
            (ours - theirs, "start fresh at --attn.alpha"),
            (theirs - ours, "left out"),
        )
        if blocks
    ]
    return [f"alpha   {'; '.join(parts)}"] if parts else []


def hidden_settings(content: dict[str, Any], config: Config | None, source: str) -> dict[str, Any]:
    """Settings of the file's model that its weights don't show, as far as they are known.

    config: of a file of ours. The original's training files hold its command line; its released files have 8 heads,
    and dc5 in their names where the model is dilated. Of bare weights nothing is known.
    """
    if config is not None:
        return {"heads": config.model.heads, "dilation": config.model.dilation}
    if "args" in content:
        return {"heads": getattr(content["args"], "nheads", 8), "dilation": getattr(content["args"], "dilation", False)}
    dilated = {"dilation": True} if "dc5" in Path(source).name.lower() else {}
    return {"heads": 8, **dilated} if "model" in content else dilated


def check_architecture(state: State, hidden: dict[str, Any], model: DETR, flag: str) -> None:
    """Raises UserError naming the settings in which the file's model is another one than `model`.

    hidden: settings that the file's weights don't show.
    """
    theirs, ours = architecture(state) | hidden, architecture(model.state_dict())
    ours["heads"] = next(module.heads for module in model.modules() if isinstance(module, Attention))
    ours["dilation"] = any(module.dilation == (2, 2) for module in model.modules() if isinstance(module, nn.Conv2d))
    theirs = ours | theirs  # what is not known is taken to be the same
    other = [f"model.{key} is {theirs[key]} there and {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    if other:
        raise UserError(f"{flag}: another model than this: {', '.join(other)}; give the same settings or another file")


def check_heads(state: State, source: str) -> None:
    """Raises UserError unless the class head and the queries have the shapes of a DETR's."""
    sizes = [state[name].shape if name in state else () for name in (*HEAD, QUERIES)]
    if not (len(sizes[0]) == len(sizes[2]) == 2 and sizes[0] == (*sizes[1], sizes[2][1]) and min(sizes[0]) > 0):
        raise UserError(
            f"{source}: holds no weights of a DETR; give an original checkpoint or a .ckpt of one of our runs"
        )


def architecture(state: State) -> dict[str, Any]:
    """Settings of a model that the names and shapes of its weights show."""

    def count(prefix: str) -> int:
        """How many numbers follow a prefix, as of layers."""
        return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})

    body = "backbone.0.body.layer"
    bottleneck = f"{body}1.0.conv3.weight" in state
    names = {False: {2: "resnet18", 3: "resnet34"}, True: {3: "resnet50"}}
    backbone = names[bottleneck].get(count(f"{body}1."), "unknown")
    linear1 = state.get("transformer.decoder.layers.0.linear1.weight")
    return {
        "backbone": "resnet101" if bottleneck and count(f"{body}3.") == 23 else backbone,
        "last_stage": f"layer{count(body)}",
        "cross_attention": "conditional" if REFERENCE in state else "original",
        "position": "learned" if "backbone.1.row_embed.weight" in state else "sine",
        "hidden_dim": state[QUERIES].shape[-1],
        "enc_layers": count("transformer.encoder.layers."),
        "dec_layers": count("transformer.decoder.layers."),
        "dim_feedforward": 0 if linear1 is None or linear1.ndim == 0 else len(linear1),
        "pre_norm": "transformer.encoder.norm.weight" in state,
    }
