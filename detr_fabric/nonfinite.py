"""What happens when a loss or a gradient is not finite: the first bad place is named, the step is saved for replay, and
all ranks stop together or drop the step.

fp16's scaled gradients overflow now and then; with finite losses that is normal and no case of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from detr_fabric.batch import ImageBatch, Target, normalize
from detr_fabric.checkpoint import save_checkpoint
from detr_fabric.errors import EveryRankError
from detr_fabric.loss.criterion import SetCriterion

if TYPE_CHECKING:
    from detr_fabric.loop import Run, Step
    from detr_fabric.recorder import Recorder

MicroBatch = tuple[ImageBatch, list[Target]]
BLACK_BOX = "nonfinite.pt"  # in the run folder: the first step of the latest series


class Findings(NamedTuple):
    """What one rank found when it ran a step again."""

    place: str | None  # the first one that is not finite; None: all is finite here
    losses: dict[str, float]  # total and parts of the micro-batch where it was found, else of the last one
    image_ids: list[int | str]  # of the same micro-batch; of all of them where nothing was found


class BatchStatistics:
    """The running statistics of trained batch norm, which a forward pass moves, as they were."""

    def __init__(self, model: nn.Module) -> None:
        norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        self._now = [buffer for norm in norms for buffer in norm.buffers()]
        self._before = [buffer.clone() for buffer in self._now]

    def restore(self) -> None:
        for now, before in zip(self._now, self._before, strict=True):
            now.copy_(before)


class HostCopy:
    """Numbers on their way from the device to the host, of which nobody has to wait for them: read in the next step,
    after its matching, they have arrived."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


class Judge:
    """Says of each step whether it was finite, one step later: the host need not wait for the device to know.

    Until then nothing is lost. The optimizer has left out such a step on the device, so weights and moments are as they
    were, and the next step is taken once more.
    """

    def __init__(self, run: Run, recorder: Recorder) -> None:
        self._run, self._recorder = run, recorder
        self.waiting: Step | None = None  # the step to be judged

    def drops(self) -> bool:
        """Whether the waiting step, if there is one, was not finite and is left out, which is recorded. Every rank must
        call. Raises EveryRankError where drop_step does."""
        step, self.waiting = self.waiting, None
        if step is None:
            return False
        if step.finite.read():
            self._run.state.dropped_in_a_row = 0
            return False
        if is_overflow(self._run.fabric, step):
            return False
        step.statistics.restore()
        self._recorder.dropped(drop_step(self._run, step), self._run.state.dropped, step.number)
        return True

    def clears(self) -> bool:
        """Whether nothing is wrong with the run as it is, so that it may be saved. Any rank may ask alone."""
        return self.waiting is None or (bool(self.waiting.finite.read()) and not self.drops())


def loss_scale(fabric: Fabric) -> float | None:
    """What fp16's losses are multiplied by; None in other precisions."""
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return None if scaler is None else scaler.get_scale()


def is_overflow(fabric: Fabric, step: Step) -> bool:
    """Whether a gradient that is not finite means only that fp16's loss scale was too large: the scaler then leaves out
    the step and lowers the scale. Every rank must call, and all get the same answer."""
    if step.loss_scale is None or step.loss_scale <= 1:  # at that scale the gradient itself has overflown
        return False
    broken = cast(Tensor, fabric.all_reduce((~step.losses.total.isfinite()).float(), reduce_op="sum"))
    return broken.item() == 0


def drop_step(run: Run, step: Step) -> str:
    """Finds out what is not finite in a step, saves it for replay, and returns a sentence if it is to be dropped.

    Every rank must call. Raises EveryRankError unless train.on_nonfinite says skip, and after train.max_nonfinite steps
    in a row. No gradient is left, nor does the model change.
    """
    train, fabric, state, losses = run.cfg.train, run.fabric, run.state, step.losses
    run.optimizer.zero_grad()
    mine = examine(fabric, run.model.module, run.criterion, step.micro_batches, step.normalizers, step.dropout_seed)
    run.optimizer.zero_grad()
    parts = [name for name, value in {"loss": losses.total, **losses.parts}.items() if not value.isfinite()]
    everyone = [(mine, parts)]
    if fabric.world_size > 1:
        everyone = [(mine, parts)] * fabric.world_size
        torch.distributed.all_gather_object(everyone, (mine, parts))
    culprits = [rank for rank, (found, bad) in enumerate(everyone) if found.place or bad] or [*range(len(everyone))]
    file = run.folder / BLACK_BOX
    cure = f"see what happened with python -m detr_fabric.replay {file}"
    if state.dropped_in_a_row == 0:
        if fabric.global_rank == culprits[0]:
            try:
                save_checkpoint(file, black_box(run, step, mine), keep_previous=False)
            except (OSError, RuntimeError) as error:  # torch wraps what the system says
                cure = f"{file} can't be written ({str(error.__cause__ or error).splitlines()[0]})"
        cure = fabric.broadcast(cure, src=culprits[0])
    sentence = f"step {step.number}: {_what([everyone[rank] for rank in culprits])}; {cure}"
    state.dropped += 1
    state.dropped_in_a_row += 1
    if train.on_nonfinite == "stop":
        exact = "" if fabric.strategy.precision.precision == "32-true" else ", use --train.precision 32-true"
        raise EveryRankError(f"{sentence}, lower --optim.lr{exact} or leave such steps out: --train.on-nonfinite skip")
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

    statistics = BatchStatistics(model)
    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    for name, p in model.named_parameters():
        if p.requires_grad:  # the norm overflows sooner than its elements, and is what gradients are clipped by
            hooks.append(p.register_hook(lambda gradient, name=name: note(f"the gradient of {name}", gradient.norm())))
    precision = fabric.strategy.precision
    num_boxes, class_weight_sum = normalizers
    torch.manual_seed(seed)
    try:
        for micro_batch in micro_batches:
            batch, targets = fabric.to_device(micro_batch)
            inputs = precision.convert_input(tuple(normalize(batch)))
            with precision.forward_context(), torch.compiler.set_stance("force_eager"):  # hooks see every module
                outputs = model(*inputs)
            losses = criterion(precision.convert_output(outputs), targets, num_boxes.clamp(min=1), class_weight_sum)
            values = {"loss": losses.total, **losses.parts}
            for name, value in values.items():
                note("the total loss" if name == "loss" else f"the part {name} of the loss", value)
            if not places:
                losses.total.backward()
            if places:
                break
    finally:
        for hook in hooks:
            hook.remove()
        statistics.restore()
    shown = [target.image_id for target in targets]
    everything = [target.image_id for _, targets in micro_batches for target in targets]
    found = {name: value.item() for name, value in values.items()}
    return Findings(places[0], found, shown) if places else Findings(None, found, everything)


def _tensors(output: object) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def black_box(run: Run, step: Step, findings: Findings) -> dict[str, Any]:
    """Everything that losses and gradients of a step depend on, as plain tensors, numbers and strings.

    It has no "model", so that nothing takes it for a checkpoint to go on from.
    """
    return {
        "weights": run.model.state_dict(),
        "config": run.cfg.to_dict(),
        "categories": run.train_set.categories.to_dict(),
        "precision": run.fabric.strategy.precision.precision,
        "step": step.number,
        "rank": run.fabric.global_rank,
        "dropout_seed": step.dropout_seed,
        "normalizers": step.normalizers.cpu(),
        "findings": list(findings),
        "micro_batches": [
            {"images": batch.images.cpu(), "mask": batch.mask.cpu(), "targets": [list(target) for target in targets]}
            for batch, targets in step.micro_batches
        ],
    }


def micro_batches_of(content: dict[str, Any]) -> list[MicroBatch]:
    """The batches in a black box."""
    return [
        (ImageBatch(part["images"], part["mask"]), [Target(*target) for target in part["targets"]])
        for part in content["micro_batches"]
    ]
