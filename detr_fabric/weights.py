"""What a model starts from: weights of an official DETR file or one of ours, fitted to other classes and queries.

Rows of the class head go by the name of their class; all else must be there, in the same shape.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from detr_fabric.checkpoint import load_model_state, read_weights
from detr_fabric.data.categories import COCO91_CLASSES, Categories, listed, plain
from detr_fabric.data.coco_classes import COCO_CLASSES
from detr_fabric.errors import UserError
from detr_fabric.model.attention import Attention
from detr_fabric.model.detr import DETR

State = dict[str, Tensor]
Rows = list[int | None]  # for each row of this model the row of the file that it gets; None: it stays fresh

HEAD = ("class_embed.weight", "class_embed.bias")  # (C+1, D), (C+1): the last row is "no object"
QUERIES = "query_embed.weight"  # (Q, D)
OPTIONAL = ("alpha_logit", "num_batches_tracked")  # of learned alphas; of batch norm that is trained


def load_weights(model: DETR, source: str, categories: Categories) -> list[str]:
    """Weights at a path or URL → a freshly built model for `categories`. Returns lines that say what came of it.

    Raises UserError when the file can't be had or is of another architecture, and when model.freeze would keep from
    training what stays fresh.
    """
    flag = f"--model.checkpoint {source}"
    content, state = read_weights(source)
    own = model.state_dict()
    check_architecture(content, state, model, flag)

    width, queries = len(state[HEAD[1]]) - 1, len(state[QUERIES])
    names = class_names(content, width)
    rows = head_rows(names, width, categories)
    query_rows: Rows = [row if row < queries else None for row in range(len(own[QUERIES]))]
    fitted = {name: value for name, value in state.items() if name in own or not name.endswith(OPTIONAL)}
    fitted |= {name: value for name, value in own.items() if name not in state and name.endswith(OPTIONAL)}
    fitted |= {name: carry_over(own[name], state[name], [*rows, width]) for name in HEAD}
    fitted[QUERIES] = carry_over(own[QUERIES], state[QUERIES], query_rows)
    load_model_state(model, fitted, flag)

    for part, fresh, parameter in (("heads", rows, HEAD[0]), ("decoder", query_rows, QUERIES)):
        if None in fresh and not model.get_parameter(parameter).requires_grad:
            what = "classes" if part == "heads" else "queries"
            raise UserError(f"{flag}: --model.freeze {part} would leave its new {what} untrained; do not freeze {part}")
    return [
        f"weights backbone, encoder, decoder and box head from {source}",
        head_line(names, rows, categories),
        f"queries {min(queries, len(query_rows))} of {len(query_rows)} carried over",
        *alpha_line(state, own),
    ]


def is_ours(content: dict[str, Any]) -> bool:
    return {"config", "categories", "version"} <= content.keys()


def class_names(content: dict[str, Any], width: int) -> dict[int, str] | None:
    """Label → class name of a file, as far as it has names; None: nothing is known about its classes."""
    if is_ours(content):
        categories = Categories.from_dict(content["categories"])
        return {label: categories.name(label) for label in categories.labels.values()}
    return COCO_CLASSES if width == COCO91_CLASSES else None


def head_rows(names: dict[int, str] | None, width: int, categories: Categories) -> Rows:
    """The row of the file for each class of the model: that of the same name, whatever its case and underscores.

    In files without names all rows are the model's if they are as many, else none. Labels that COCO's numbering leaves
    unused have no name, and go by their number.
    """
    if names is None:
        return [label if width == categories.num_classes else None for label in range(categories.num_classes)]
    by_name = {plain(name): label for label, name in reversed(names.items())}
    wanted = {label: categories.name(label) for label in categories.labels.values()}
    rows: Rows = []
    for label in range(categories.num_classes):
        name = plain(wanted[label]) if label in wanted else None
        if name is None:
            rows.append(label if width == COCO91_CLASSES else None)
        else:
            rows.append(label if plain(names.get(label, "")) == name else by_name.get(name))
    return rows


def carry_over(own: Tensor, theirs: Tensor, rows: Rows) -> Tensor:
    """A copy of `own` with the rows of `theirs` that are to replace its own."""
    result = own.clone()
    for row, their_row in enumerate(rows):
        if their_row is not None:
            result[row] = theirs[their_row]
    return result


def head_line(names: dict[int, str] | None, rows: Rows, categories: Categories) -> str:
    labels = categories.labels.values()
    kept = [categories.name(label) for label in labels if rows[label] is not None]
    new = [categories.name(label) for label in labels if rows[label] is None]
    how = "by name" if names is not None else "by number (the weights name no classes)"
    line = f"head    {len(kept)} of {len(labels)} classes and no-object carried over"
    line += f" {how}: {listed(kept)}" if kept else ""
    return f"{line}; new: {listed(new)}" if new else line


def alpha_line(state: State, own: State) -> list[str]:
    """What became of learned alphas, where the file or the model has any."""
    theirs, ours = ({name for name in tensors if name.endswith("alpha_logit")} for tensors in (state, own))
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


def check_architecture(content: dict[str, Any], state: State, model: DETR, flag: str) -> None:
    """Raises UserError naming the settings in which the file's model is another one."""
    sizes = [state[name].shape if name in state else () for name in (*HEAD, QUERIES)]
    if not (len(sizes[0]) == len(sizes[2]) == 2 and sizes[1] == sizes[0][:1] and sizes[1][0] > 0):
        raise UserError(f"{flag}: holds no weights of a DETR; give an official file or a .ckpt of one of our runs")
    theirs, ours = architecture(state), architecture(model.state_dict())
    if is_ours(content):  # weights don't show the number of heads
        theirs["heads"] = content["config"]["model"]["heads"]
        ours["heads"] = next(module.heads for module in model.modules() if isinstance(module, Attention))
    other = [f"model.{key} is {theirs[key]} there and {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    if other:
        raise UserError(f"{flag}: another model than this: {', '.join(other)}; give the same settings or another file")


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
        "position": "learned" if "backbone.1.row_embed.weight" in state else "sine",
        "hidden_dim": state[QUERIES].shape[-1],
        "enc_layers": count("transformer.encoder.layers."),
        "dec_layers": count("transformer.decoder.layers."),
        "dim_feedforward": 0 if linear1 is None else len(linear1),
        "pre_norm": "transformer.encoder.norm.weight" in state,
    }
