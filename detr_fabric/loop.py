"""Training, top to bottom: set up everything, then epochs of steps, evaluations and checkpoints.

Only this file, evaluation, launch, nonfinite, resume and signals know that there is more than one process.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from detr_fabric.batch import ImageBatch, Target, normalize
from detr_fabric.checkpoint import load_model_state
from detr_fabric.config import Config
from detr_fabric.data.coco import CocoDetection
from detr_fabric.data.loader import EvalLoader, TrainLoader, build_datasets
from detr_fabric.data.report import padding_summary, summary
from detr_fabric.errors import UserError
from detr_fabric.evaluation import evaluate
from detr_fabric.folder import RunLock, run_folder
from detr_fabric.launch import build_fabric, end_together, make_deterministic, settle_reduction_order
from detr_fabric.loss.criterion import Losses, SetCriterion
from detr_fabric.memory import within_memory
from detr_fabric.model.detr import build_model
from detr_fabric.nonfinite import BatchStatistics, HostCopy, Judge, loss_scale
from detr_fabric.optimizer import build_optimizer, build_scheduler
from detr_fabric.preflight import preflight
from detr_fabric.recorder import Recorder, count_parameters
from detr_fabric.resume import Saver, State, checkpoint_exists, read_checkpoint, restore_optimizer, restore_state
from detr_fabric.signals import Preempted, Preemption, leave_marker
from detr_fabric.weights import load_weights

MicroBatch = tuple[ImageBatch, list[Target]]
T = TypeVar("T")


class Step(NamedTuple):
    """The gradient of an optimizer step is there: this is what came of it, and what it came of."""

    number: int  # from 1
    micro_batches: list[MicroBatch]
    normalizers: Tensor  # (2,) num_boxes, class_weight_sum
    dropout_seed: int
    statistics: BatchStatistics  # as they were before
    losses: Losses
    grad_norm: Tensor
    finite: HostCopy  # whether the gradient is, the same on all ranks
    ranks: HostCopy  # ranks that were asked to stop, images that could not be read: means over ranks
    loss_scale: float | None  # fp16's


class Run(NamedTuple):
    """What the loop works with."""

    cfg: Config
    fabric: Fabric
    model: _FabricModule
    criterion: SetCriterion
    optimizer: _FabricOptimizer
    scheduler: LambdaLR
    train_set: CocoDetection
    val_set: CocoDetection
    train_loader: TrainLoader
    val_loader: EvalLoader
    folder: Path
    lock: RunLock | None  # rank 0's
    state: State
    total_steps: int
    step_offset: int  # place in the planned epochs minus steps done: 0 unless the number of ranks has changed
    preemption: Preemption
    notes: list[str]  # what there is to say about the weights it starts from, or the resumption


def setup(cfg: Config, preemption: Preemption) -> Run:
    """Builds what a resolved config asks for. Raises UserError, on every rank alike, for what the user can mend."""
    train, data = cfg.train, cfg.data
    if train.deterministic:
        make_deterministic()
    fabric = build_fabric(
        train.accelerator, train.devices, train.precision, broadcast_buffers=cfg.model.norm == "batch"
    )
    fabric.launch()
    end_together(fabric)

    train_set, val_set = build_datasets(data, train.seed)
    rank, world, pin_memory = fabric.global_rank, fabric.world_size, fabric.device.type == "cuda"
    train_loader = TrainLoader(
        train_set,
        train.batch_size,
        train.accumulate,
        train.seed,
        rank,
        world,
        data.workers,
        data.pad_multiple,
        pin_memory,
        data.group_by_shape,
        data.max_batch_pixels,
    )
    val_loader = EvalLoader(val_set, cfg.eval.batch_size, rank, world, data.workers, data.pad_multiple, pin_memory)

    folder = fabric.broadcast(run_folder(cfg))
    resuming = checkpoint_exists(cfg, folder)
    torch.manual_seed(train.seed)
    num_classes = train_set.categories.num_classes
    model = build_model(cfg.model, cfg.attn, num_classes, pretrained=not resuming)
    notes = list[str]()
    if not resuming and cfg.model.checkpoint is not None:
        notes += load_weights(model, cfg.model.checkpoint, train_set.categories)
    model.to(memory_format=torch.channels_last)
    criterion = SetCriterion(num_classes, **asdict(cfg.loss)).to(fabric.device)
    optimizer = build_optimizer(model, cfg.optim, fused=train.precision != "16-mixed")
    epoch_steps = train_loader.steps_per_epoch
    planned = min(train.epochs * epoch_steps, train.max_steps or math.inf)
    scheduler = build_scheduler(optimizer, cfg.optim, epoch_steps, int(planned))

    lock = lock_folder(fabric, folder)
    state = State()
    if resuming:
        source, content = read_checkpoint(cfg, folder, notes)
        load_model_state(model, content["model"], str(source))
        state = restore_state(content, source, cfg, train_set.annotations, train_loader, notes)
    position = state.epoch * epoch_steps + state.step_in_epoch
    total_steps = int(min(train.epochs * epoch_steps - position + state.step, train.max_steps or math.inf))
    if state.step >= total_steps and state.evaluated == state.step:
        raise UserError(f"{folder}: all {state.step} steps are done, nothing is left; raise --train.epochs")
    if train.compile:
        model.compile()  # in place, so that names stay; batches of a second shape make the sizes dynamic, for good
    model, optimizer = fabric.setup(model, optimizer)
    if resuming:
        restore_optimizer(content, source, fabric, optimizer, scheduler, position)
    if fabric.device.type == "cuda" if train.preflight is None else train.preflight:
        notes.append(preflight(cfg, fabric, model, criterion, optimizer, train_set.annotations.sizes))
    settle_reduction_order(fabric, model)
    return Run(
        cfg,
        fabric,
        model,
        criterion,
        optimizer,
        scheduler,
        train_set,
        val_set,
        train_loader,
        val_loader,
        folder,
        lock,
        state,
        total_steps,
        position - state.step,
        preemption,
        notes,
    )


def lock_folder(fabric: Fabric, folder: Path) -> RunLock | None:
    """Rank 0's lock on the run folder. Raises UserError, on every rank alike, where another run holds it."""
    lock, refusal = None, None
    if fabric.is_global_zero:
        try:
            lock = RunLock(folder)
        except UserError as error:
            refusal = str(error)
    refusal = fabric.broadcast(refusal)
    if refusal is not None:
        raise UserError(refusal)
    return lock


def fit(run: Run) -> None:
    """The training loop. Raises Preempted, on every rank alike, when the run was asked to stop and has been saved."""
    cfg, state, loader = run.cfg, run.state, run.train_loader
    meter = Meter(loader.global_batch)
    with (
        run.preemption,
        Recorder(
            run.fabric,
            cfg,
            run.folder,
            run.model,
            run.val_set,
            loader.steps_per_epoch,
            run.total_steps,
            run.step_offset,
            state.step,
            state.wandb_run_id,
        ) as recorder,
    ):
        state.wandb_run_id = recorder.wandb_run_id
        saver = Saver(run, recorder.progress.say)
        judge = Judge(run, recorder)
        introduce(run, recorder)
        while state.step < run.total_steps or state.evaluated < state.step:
            run.model.train()
            meter.restart()
            for micro_batches in meter.waiting(loader.epoch(state.epoch, skip=state.step_in_epoch)):
                if state.step >= run.total_steps:
                    break
                with within_memory(cfg, run.fabric.device, micro_batches, state.step + 1):
                    step = training_step(run, micro_batches)
                    if judge.drops():  # the step before this one, of which the device has told meanwhile
                        step = training_step(run, micro_batches)
                    update(run, step)
                judge.waiting = step
                run.scheduler.step()
                state.step += 1
                state.step_in_epoch += 1
                asked_to_stop, unreadable = step.ranks.read().tolist()
                if unreadable:
                    state.skipped += recorder.skipped(micro_batches, state.step)
                logging = state.step % cfg.train.log_every == 0 or state.step == run.total_steps
                if logging or asked_to_stop or step.loss_scale is not None:
                    judge.drops()
                if logging:
                    numbers = meter.read()
                    if state.skipped:
                        numbers["skipped_images"] = state.skipped
                    if cfg.train.compile:
                        numbers["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                    recorder.training(
                        step.losses, run.criterion.weights, step.grad_norm, run.optimizer, numbers, state.step
                    )
                else:
                    recorder.progress.update(state.epoch, state.step)
                if asked_to_stop:
                    leave(run, recorder, saver)
                if saver.due() and judge.clears():
                    saver.save()

            judge.drops()
            finished, epoch_done = state.step >= run.total_steps, state.step_in_epoch == loader.steps_per_epoch
            copies = []
            if finished or (state.epoch + 1) % cfg.eval.every == 0:
                try:
                    evaluation = evaluate(
                        run.fabric, run.model, run.val_loader, run.val_set, cfg.eval.backend, run.preemption
                    )
                except Preempted:
                    leave(run, recorder, saver)
                if evaluation is not None:
                    recorder.evaluation(evaluation, state.step)
                state.evaluated = state.step
                ap = run.fabric.broadcast(evaluation.stats["AP"] if evaluation is not None else -1.0)
                if ap > state.best_ap:
                    state.best_ap = ap
                    copies.append("best.ckpt")
            if epoch_done:
                state.epoch, state.step_in_epoch = state.epoch + 1, 0
            if epoch_done and cfg.train.keep_every and state.epoch % cfg.train.keep_every == 0:
                copies.append(f"epoch_{state.epoch:04d}.ckpt")
            if finished or copies or state.epoch % cfg.train.checkpoint_every == 0:
                saver.save(*copies)
        if state.skipped:
            recorder.progress.say(f"images were skipped {state.skipped} times, named in {run.folder / 'log.jsonl'}")
        if saver.failed:
            raise UserError(f"{run.folder}: the final state could not be saved; free space and start the same command")


def leave(run: Run, recorder: Recorder, saver: Saver) -> NoReturn:
    """Saves and ends a run that was asked to stop; whoever starts the same command again continues it."""
    saver.save()
    if run.fabric.is_global_zero:
        leave_marker(run.folder, run.state.step, run.cfg.train.requeue, recorder.progress.say)
        recorder.preempted()
        recorder.progress.say(f"stopped after step {run.state.step}; the same command goes on from there")
    raise Preempted


def introduce(run: Run, recorder: Recorder) -> None:
    """Says in a few lines what is about to be trained on what."""
    cfg, say = run.cfg, recorder.progress.say
    where = "built-in synthetic shapes, for no --data.root is given" if cfg.data.builtin else run.train_set.folder
    say(
        f"data    {where}: {len(run.train_set)} training and {len(run.val_set)} validation images, "
        f"{len(run.train_set.categories.ids)} classes"
    )
    for name, data in (("train", run.train_set), ("val", run.val_set)):
        say(f"{name:8}{summary(data.annotations, cfg.model.num_queries)}")
    grouped = cfg.data.group_by_shape
    padding, otherwise = (run.train_loader.padding(how) for how in (grouped, not grouped))
    say(f"padding {padding_summary(padding, otherwise, grouped, cfg.data.max_batch_pixels)}")
    parameters = count_parameters(run.model)
    start = cfg.model.checkpoint or cfg.model.backbone_weights
    norm = "frozen batch norm" if cfg.model.norm == "frozen" else "trained batch norm"
    say(
        f"model   {cfg.model.backbone} ({norm}; weights: {start}), {cfg.attn.kind} attention, "
        f"{parameters['total'] / 1e6:.1f} M parameters, {parameters['trainable'] / 1e6:.1f} M trained"
    )
    train, world = cfg.train, run.fabric.world_size
    device, precision = run.fabric.device.type, run.fabric.strategy.precision.precision
    say(
        f"steps   {run.total_steps} of {train.batch_size} images x {train.accumulate} accumulated x {world} ranks = "
        f"{train.batch_size * train.accumulate * world}, on {device} in {precision}"
    )
    say(f"folder  {run.folder}" + (f", resumed at step {run.state.step}" if run.state.step else ""))
    for note in run.notes:
        say(note)


def training_step(run: Run, micro_batches: list[MicroBatch]) -> Step:
    """The gradient of an optimizer step, clipped, summed over all micro-batches and averaged over ranks.

    Ranks may have unequally many micro-batches, for they meet in the last one's backward pass alone. The host waits for
    the device once in each pass: for the costs that it matches by.
    """
    cfg, fabric, model, criterion = run.cfg, run.fabric, run.model, run.criterion
    dropout_seed = random.Random(f"dropout-{cfg.train.seed}-{run.state.step}-{fabric.global_rank}").getrandbits(63)
    torch.manual_seed(dropout_seed)
    all_targets = [target for _, targets in micro_batches for target in targets]
    normalizers = criterion.normalizers(all_targets, cfg.model.num_queries)
    faults = sum(target.fault is not None for target in all_targets)
    mine = torch.tensor([*normalizers, float(run.preemption.requested is not None), float(faults)])
    # a copy that blocks would wait for all that the device still has to do of the step before
    means = cast(Tensor, fabric.all_reduce(mine.to(fabric.device, non_blocking=True), reduce_op="mean"))
    num_boxes, class_weight_sum = means[:2]
    ranks = HostCopy(means[2:])

    statistics = BatchStatistics(model.module)
    parts = []
    for index, micro_batch in enumerate(micro_batches, start=1):
        batch, targets = fabric.to_device(micro_batch)
        with fabric.no_backward_sync(model, enabled=index < len(micro_batches)):
            outputs = model(*normalize(batch))  # pred_logits (L, B, Q, C+1), pred_boxes (L, B, Q, 4)
            losses = criterion(outputs, targets, num_boxes.clamp(min=1), class_weight_sum)
            # a loss that is not finite makes the whole gradient NaN, whose average over ranks tells all of them
            fabric.backward(losses.total * (1 + 0 * losses.total.detach()))
        parts.append(Losses(losses.total.detach(), losses.parts))
    losses = add_losses(parts, [len(targets) for _, targets in micro_batches])

    max_norm = cfg.optim.clip_max_norm or math.inf
    grad_norm = fabric.clip_gradients(model, run.optimizer, max_norm=max_norm, error_if_nonfinite=False)
    assert grad_norm is not None
    return Step(
        run.state.step + 1,
        micro_batches,
        means[:2],
        dropout_seed,
        statistics,
        losses,
        grad_norm,
        HostCopy(grad_norm.isfinite()),
        ranks,
        loss_scale(fabric),
    )


def update(run: Run, step: Step) -> None:
    """Moves the weights, unless the gradient is not finite: the device sees to that, the host hears of it later."""
    if step.loss_scale is None:
        fused_adamw = cast(Any, run.optimizer.optimizer)
        fused_adamw.found_inf = (~step.grad_norm.isfinite()).float()  # where it is 1 nothing changes
    elif not step.finite.read():  # the loss scaler asks the host anyway
        run.optimizer.zero_grad()
    run.optimizer.step()
    run.optimizer.zero_grad()


def add_losses(parts: list[Losses], images: list[int]) -> Losses:
    """Losses of an effective batch from those of its parts, of so many images each: sums, for each was divided by the
    whole; errors, not divided, are averaged over images."""
    shares = [number / sum(images) for number in images]
    return Losses(
        torch.stack([p.total for p in parts]).sum(),
        {
            name: torch.stack(
                [p.parts[name] * (share if "error" in name else 1) for p, share in zip(parts, shares, strict=True)]
            ).sum()
            for name in parts[0].parts
        },
    )


class Meter:
    """Images a second and the share of time spent waiting for data, since the last reading."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.restart()

    def restart(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, with the time taken to get each counted as waiting."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            self.steps += 1
            yield batch

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.started
        values = {"images_per_second": self.steps * self.images_per_step / elapsed, "data_wait": self.waited / elapsed}
        self.restart()
        return values
