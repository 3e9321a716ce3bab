"""The training loop, top to bottom: fit → train_epoch → training_step → update, then finish_epoch."""

from __future__ import annotations

import math
import random
from itertools import islice
from typing import NoReturn

import torch

from detr_fabric.build import introduce
from detr_fabric.data.batch import MicroBatch, Target
from detr_fabric.errors import EveryRankError, UserError
from detr_fabric.evaluate.detect import evaluate
from detr_fabric.evaluate.losses import ValidationLosses
from detr_fabric.loss.criterion import add_losses, forward_backward
from detr_fabric.model.attention import attend_with_softmax
from detr_fabric.model.batch_statistics import BatchStatistics
from detr_fabric.model.detr import DETROutput
from detr_fabric.runtime.ema import to_evaluate
from detr_fabric.runtime.memory import within_memory
from detr_fabric.runtime.nonfinite import drop_step, is_overflow, loss_scale
from detr_fabric.runtime.preemption import Preempted, leave_marker
from detr_fabric.runtime.ranks import mean_over_ranks
from detr_fabric.runtime.resume import Saver
from detr_fabric.runtime.run import Run, Step
from detr_fabric.tracking.meter import Meter
from detr_fabric.tracking.recorder import Recorder


def fit(run: Run) -> None:
    """Trains to the last step. Raises Preempted, on every rank alike, when the run was asked to stop and has saved."""
    with run.preemption, Recorder(run) as recorder:
        introduce(run, recorder.say)
        saver = Saver(run, recorder.say)

        # An epoch of steps, then what is due after it. A run that stopped before its last evaluation goes on with that.
        while run.state.step < run.total_steps or run.state.evaluated < run.state.step:
            train_epoch(run, recorder, saver)
            finish_epoch(run, recorder, saver)

        if saver.moved:
            raise UserError(saver.moved)
        recorder.finish()
        if saver.failed:
            raise UserError(f"{run.folder}: the final state could not be saved; free space and start the same command")


def train_epoch(run: Run, recorder: Recorder, saver: Saver) -> None:
    """Optimizer steps to the end of the epoch, or of the run."""
    cfg, state, loader = run.cfg, run.state, run.train_loader
    meter = Meter(loader.global_batch)
    run.model.train()
    steps = loader.epoch(state.epoch, skip=state.step_in_epoch)
    for micro_batches in meter.waiting(islice(steps, max(0, run.total_steps - state.step))):
        # A single training step.
        with within_memory(cfg, run.fabric.device, micro_batches, state.step + 1):
            step = training_step(run, micro_batches)
            update(run, step, recorder)

        # Images that could not be read were replaced; all ranks count and name them.
        if step.unreadable:
            state.skipped += recorder.skipped(micro_batches)

        # Once in a while: log the mean losses since the last record.
        recorder.count(step)
        if state.step % cfg.train.log_every == 0 or state.step == run.total_steps:
            recorder.training(step, meter.read())
        else:
            recorder.progress.update(state.epoch, state.step)

        # Asked to stop (a signal on any rank), or time for a checkpoint inside the epoch.
        if step.stop_requested:
            leave(run, recorder, saver)
        if saver.due():
            saver.save()


def training_step(run: Run, micro_batches: list[MicroBatch]) -> Step:
    """The clipped gradient of one optimizer step, summed over micro-batches and averaged over ranks.

    Ranks may have different numbers of micro-batches: they synchronise only in the backward pass of the last.
    """
    cfg, fabric, model, criterion = run.cfg, run.fabric, run.model, run.criterion

    # The first part of the run may train with softmax (attn.softmax_first).
    attend_with_softmax(model, run.state.step < run.softmax_steps)

    # Dropout is a function of (seed, step, rank), so that a resumed run repeats it.
    dropout_seed = random.Random(f"dropout-{cfg.train.seed}-{run.state.step}-{fabric.global_rank}").getrandbits(63)
    torch.manual_seed(dropout_seed)
    statistics = BatchStatistics(model.module)

    # Losses are divided by numbers of the whole effective batch, so all ranks have to know them before they start.
    targets = [target for _, targets in micro_batches for target in targets]
    normalizers = criterion.normalizers(targets, cfg.model.num_queries)
    unreadable = sum(target.read_error is not None for target in targets)
    mine = torch.tensor([*normalizers, run.preemption.requested is not None, unreadable], dtype=torch.float32)
    means = mean_over_ranks(mine.to(fabric.device, non_blocking=True))

    # Forward, losses and backward of each micro-batch; the gradients add up.
    parts = []
    for index, micro_batch in enumerate(micro_batches, start=1):
        with fabric.no_backward_sync(model, enabled=index < len(micro_batches)):
            on_device = fabric.to_device(micro_batch)
            parts.append(forward_backward(model, criterion, on_device, means[:2], fabric.backward))

    # Clip, then ask the device: the host waits for it here and in each matching, nowhere else.
    max_norm = cfg.optim.clip_max_norm or math.inf
    grad_norm = fabric.clip_gradients(model, run.optimizer, max_norm=max_norm, error_if_nonfinite=False)
    assert grad_norm is not None
    finite, stop_requested, any_unreadable = torch.stack([grad_norm.isfinite(), *(means[2:] > 0)]).tolist()
    return Step(
        number=run.state.step + 1,
        micro_batches=micro_batches,
        normalizers=means[:2],
        dropout_seed=dropout_seed,
        statistics=statistics,
        losses=add_losses(parts, [len(targets) for _, targets in micro_batches]),
        grad_norm=grad_norm,
        finite=finite,
        stop_requested=stop_requested,
        unreadable=any_unreadable,
    )


def update(run: Run, step: Step, recorder: Recorder) -> None:
    """Moves weights and learning rates. A step that is not finite moves only the learning rates, or ends the run."""
    run.state.step += 1
    run.state.step_in_epoch += 1
    if step.finite:
        run.state.dropped_in_a_row = 0
    elif not is_overflow(run.fabric, step.losses):
        step.statistics.restore()
        recorder.dropped(drop_step(run, step))  # raises, unless --train.on-nonfinite skip
    if step.finite or loss_scale(run.fabric) is not None:  # fp16's scaler skips an overflow itself and lowers its scale
        run.optimizer.step()
    if step.finite and run.ema is not None:
        run.ema.update(run.state.step)
    run.optimizer.zero_grad()
    run.scheduler.step()


def finish_epoch(run: Run, recorder: Recorder, saver: Saver) -> None:
    """What is due after an epoch, or after the last step: an evaluation and checkpoints."""
    cfg, state = run.cfg, run.state
    finished, epoch_done = state.step >= run.total_steps, state.step_in_epoch == run.train_loader.steps_per_epoch
    names = []  # that the checkpoint gets besides last.ckpt

    # Once in a while: evaluate, on all ranks. Rank 0 scores and keeps the best.
    if finished or (state.epoch + 1) % cfg.eval.every == 0:
        losses = ValidationLosses(run.criterion)

        def watch(outputs: DETROutput, targets: list[Target]) -> None:
            losses.add(outputs, targets)
            run.preemption.check(run.fabric)

        try:
            with to_evaluate(run.ema):  # the moving average of the weights, where there is one
                evaluation = evaluate(run.fabric, run.model, run.val_loader, cfg.eval.backend, watch, cfg.eval.topk)
                mean_losses = losses.means()
                if evaluation is not None:
                    recorder.evaluation(evaluation, mean_losses)
        except Preempted:
            leave(run, recorder, saver)
        if evaluation is not None:
            ap = evaluation.stats["AP"]  # -1 without objects
            if ap > state.best_ap or not (saver.folder() / "best.ckpt").exists():
                state.best_ap = ap
                names.append("best.ckpt")
        state.evaluated = state.step

    # On to the next epoch.
    if epoch_done:
        state.epoch, state.step_in_epoch = state.epoch + 1, 0
    if epoch_done and cfg.train.keep_every and state.epoch % cfg.train.keep_every == 0:
        names.append(f"epoch_{state.epoch:04d}.ckpt")

    # Once in a while: save.
    if finished or names or state.epoch % cfg.train.checkpoint_every == 0:
        saver.save(*names)


def leave(run: Run, recorder: Recorder, saver: Saver) -> NoReturn:
    """Saves and ends a run that was asked to stop. The same command continues it."""
    saver.save()
    if moved := run.fabric.broadcast(saver.moved):
        raise EveryRankError(moved)
    if run.fabric.is_global_zero:
        leave_marker(run.folder, run.state.step, run.cfg.train.requeue, recorder.say)
    recorder.preempted()
    raise Preempted
