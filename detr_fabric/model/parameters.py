"""Which parameters of a model are trained, and how many there are."""

from __future__ import annotations

from torch import nn

BODY = "backbone.0.body"
MODULES = {  # of the parts in config.Part; those not listed are stages of the backbone
    "stem": (f"{BODY}.conv1", f"{BODY}.bn1"),
    "backbone": (BODY,),
    "input-proj": ("input_proj",),
    "encoder": ("transformer.encoder",),
    "decoder": ("transformer.decoder", "query_embed"),
    "heads": ("class_embed", "bbox_embed"),
}


def freeze(detr: nn.Module, parts: tuple[str, ...]) -> None:
    """Excludes the named parts (config.Part) of a DETR from training."""
    for part in parts:
        for name in MODULES.get(part, (f"{BODY}.{part}",)):
            detr.get_submodule(name).requires_grad_(False)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of weights: "total" and "trainable"."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"total": sum(size for size, _ in sizes), "trainable": sum(size for size, trained in sizes if trained)}
