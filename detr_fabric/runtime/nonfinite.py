"""What happens when a loss or a gradient is not finite: the first place where it goes wrong is named, the step is saved
for replay, and all ranks together stop or drop the step.

fp16's scaled gradients overflow now and then. As long as the losses are finite that is normal, and not handled here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from detr_fabric.data.batch import ImageBatch, MicroBatch, Target
from detr_fabric.errors import EveryRankError
from detr_fabric.loss.criterion import Losses, SetCriterion, forward_backward
from detr_fabric.model.batch_statistics import BatchStatistics
from detr_fabric.model.detr import DETROutput
from detr_fabric.runtime.checkpoint import save_checkpoint
from detr_fabric.runtime.ranks import mean_over_ranks, of_every_rank
from detr_fabric.runtime.run import Run, Step

REPLAY_FILE = "nonfinite.pt"  # in the run folder: the first step of the latest series


class Findings(NamedTuple):
    """What one rank found when it ran a step again."""

    place: str | None  # the first that is not finite; None: everything is finite on this rank
    losses: dict[str, float]  # total and parts of the micro-batch where it was found, else of the last one
    image_ids: list[int | str]  # of the same micro-batch; of all of them where nothing was found


def loss_scale(fabric: Fabric) -> float | None:
    """The factor by which fp16 losses are multiplied; None in other precisions."""
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return None if scaler is None else scaler.get_scale()


def is_overflow(fabric: Fabric, losses: Losses) -> bool:
    """Whether the gradient is not finite only because fp16's loss scale was too large. The scaler then skips the step
    and lowers the scale. Every rank must call, and all get the same answer."""
    scale = loss_scale(fabric)
    if scale is None or scale <= 1:  # at that scale the gradient itself has overflowed
        return False
    return mean_over_ranks((~losses.total.isfinite()).float()).item() == 0


def drop_step(run: Run, step: Step) -> str:
    """Finds what is not finite in a step, saves the step for replay, and returns a sentence if it is to be dropped.

    Every rank must call. Raises EveryRankError unless train.on_nonfinite is skip, and after train.max_nonfinite steps
    in a row. It leaves no gradients and does not change the model.
    """
    train, fabric, state, losses = run.cfg.train, run.fabric, run.state, step.losses
    run.optimizer.zero_grad()
    mine = examine(fabric, run.model.module, run.criterion, step.micro_batches, step.normalizers, step.dropout_seed)
    run.optimizer.zero_grad()
    parts = [name for name, value in named_values(losses).items() if not value.isfinite()]
    everyone = of_every_rank((mine, parts))
    culprits = [rank for rank, (found, bad) in enumerate(everyone) if found.place or bad] or [*range(len(everyone))]
    file = run.folder / REPLAY_FILE
    cure = f"see what happened with python -m detr_fabric.replay {file}"
    if state.dropped_in_a_row == 0:
        if fabric.global_rank == culprits[0]:
            try:
                save_checkpoint(file, replay_content(run, step, mine), keep_previous=False)
            except (OSError, RuntimeError) as error:  # torch wraps what the system says
                cure = f"{file} can't be written ({str(error.__cause__ or error).splitlines()[0]})"
        cure = fabric.broadcast(cure, src=culprits[0])
    sentence = f"step {step.number}: {_what([everyone[rank] for rank in culprits])}; {cure}"
    state.dropped += 1
    state.dropped_in_a_row += 1
    if train.on_nonfinite == "stop":
        exact = "" if fabric.strategy.precision.precision == "32-true" else ", use --train.precision 32-true"
        raise EveryRankError(f"{sentence}, lower --optim.lr{exact} or drop such steps: --train.on-nonfinite skip")
    if state.dropped_in_a_row >= train.max_nonfinite:
        raise EveryRankError(
            f"{sentence}; {state.dropped_in_a_row} steps in a row were dropped, the limit of --train.max-nonfinite: "
            "lower --optim.lr and start the same command, which goes on from the last checkpoint"
        )
    return f"{sentence}; the step is dropped, {state.dropped} in all, {state.dropped_in_a_row} in a row"


def _what(culprits: list[tuple[Findings, list[str]]]) -> str:
    """What is not finite, where, and with which images, from all ranks on which something is not."""
    bad = list(dict.fromkeys(name for _, parts in culprits for name in parts if name != "loss"))
    if bad:
        more = f" and {len(bad) - 6} more" if len(bad) > 6 else ""
        what = f"the loss ({', '.join(bad[:6])}{more}) is not finite"
    else:
        what = "the loss is not finite" if any(parts for _, parts in culprits) else "the gradient is not finite"
    place = culprits[0][0].place
    where = f"first {place}" if place else "but is when the step is run again"
    images = ", ".join(str(image) for found, _ in culprits for image in found.image_ids)
    return f"{what}, {where}, in a batch of images {images}"


def local_forward(fabric: Fabric, model: nn.Module) -> Callable[[Tensor, Tensor], DETROutput]:
    """The model's forward pass in the run's precision, but uncompiled and without DDP, so that a rank can run it alone
    and hooks see every module."""
    precision = fabric.strategy.precision

    def forward(images: Tensor, mask: Tensor) -> DETROutput:
        inputs = precision.convert_input((images, mask))
        with precision.forward_context(), torch.compiler.set_stance("force_eager"):
            outputs = model(*inputs)
        return cast(DETROutput, precision.convert_output(outputs))

    return forward


def examine(
    fabric: Fabric,
    model: nn.Module,
    criterion: SetCriterion,
    micro_batches: list[MicroBatch],
    normalizers: Tensor,
    seed: int,
) -> Findings:
    """Runs a step of this rank again until something is not finite: the output of a module, a loss or, on the way back,
    the gradient of an output or of a parameter. Leaves gradients behind; batch statistics are as before."""
    places: list[str] = []
    values: dict[str, Tensor] = {}

    def note(place: str, value: Tensor) -> None:
        if not value.isfinite().all():
            places.append(place)

    def watch(name: str) -> Callable[..., None]:
        def after_forward(module: nn.Module, inputs: object, output: object) -> None:
            own = [key for key, value in module.named_parameters(recurse=False) if not value.isfinite().all()]
            reason = f", whose {' and '.join(own)} is not finite" if own else ""
            for tensor in _tensors(output):
                note(f"the output of {name or 'the model'}{reason}", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: note(f"the gradient of the output of {name}", gradient))

        return after_forward

    def after_criterion(module: nn.Module, inputs: object, losses: Losses) -> None:
        values.update(named_values(losses))
        for name, value in values.items():
            note("the total loss" if name == "loss" else f"the part {name} of the loss", value)

    def backward(loss: Tensor) -> None:
        if not places:
            loss.backward()

    statistics = BatchStatistics(model)
    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    hooks.append(criterion.register_forward_hook(after_criterion))
    for name, p in model.named_parameters():
        if p.requires_grad:  # the norm overflows sooner than its elements, and is what gradients are clipped by
            hooks.append(p.register_hook(lambda gradient, name=name: note(f"the gradient of {name}", gradient.norm())))
    torch.manual_seed(seed)
    try:
        for micro_batch in micro_batches:
            on_device = fabric.to_device(micro_batch)
            forward_backward(local_forward(fabric, model), criterion, on_device, normalizers, backward)
            if places:
                break
    finally:
        for hook in hooks:
            hook.remove()
        statistics.restore()
    looked_into = [micro_batch] if places else micro_batches
    image_ids = [target.image_id for _, targets in looked_into for target in targets]
    return Findings(places[0] if places else None, {name: v.item() for name, v in values.items()}, image_ids)


def named_values(losses: Losses) -> dict[str, Tensor]:
    """Everything that the criterion says, under the names of the log: loss is the total."""
    return {"loss": losses.total, **losses.losses, **losses.metrics}


def _tensors(output: object) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def replay_content(run: Run, step: Step, findings: Findings) -> dict[str, Any]:
    """Everything that the losses and gradients of a step depend on, as plain tensors, numbers and strings.

    It has no key "model", so that it can't be mistaken for a checkpoint.
    """
    return {
        "weights": run.model.state_dict(),
        "config": run.cfg.to_dict(),
        "categories": run.train_loader.dataset.categories.to_dict(),
        "precision": run.fabric.strategy.precision.precision,
        "step": step.number,
        "rank": run.fabric.global_rank,
        "dropout_seed": step.dropout_seed,
        "softmax_first": step.number <= run.softmax_steps,
        "normalizers": step.normalizers.cpu(),
        "findings": list(findings),
        "micro_batches": [
            {"images": batch.images.cpu(), "mask": batch.mask.cpu(), "targets": [list(target) for target in targets]}
            for batch, targets in step.micro_batches
        ],
    }


def micro_batches_of(content: dict[str, Any]) -> list[MicroBatch]:
    """The batches in a replay file."""
    return [
        (ImageBatch(part["images"], part["mask"]), [Target(*target) for target in part["targets"]])
        for part in content["micro_batches"]
    ]
