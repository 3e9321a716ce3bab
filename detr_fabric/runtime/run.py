"""The nouns of training: a Run, where it stands (State), and one optimizer step (Step)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from detr_fabric.config import Config
from detr_fabric.data.batch import MicroBatch
from detr_fabric.data.loader import EvalLoader, TrainLoader
from detr_fabric.loss.criterion import Losses, SetCriterion
from detr_fabric.model.batch_statistics import BatchStatistics
from detr_fabric.runtime.ema import EMA
from detr_fabric.runtime.preemption import Preemption
from detr_fabric.runtime.run_dir import RunLock


@dataclass
class State:
    """Where a run stands. With weights, optimizer and config it is all that a resumed run needs.

    Data order, augmentation and dropout are functions of (seed, epoch, step, rank), so no generator is stored.
    """

    epoch: int = 0
    step: int = 0  # optimizer steps in all
    step_in_epoch: int = 0
    evaluated: int = 0  # the step of the last evaluation
    best_ap: float = -1.0
    skipped: int = 0  # how often an unreadable image was replaced by another one, over all ranks
    dropped: int = 0  # steps that were dropped because a loss or a gradient was not finite
    dropped_in_a_row: int = 0  # the latest of these, with no finite step since
    window_steps: int = 0  # since the last record, which averages their losses
    window_sums: Tensor | None = None  # (values,) of these steps
    wandb_run_id: str | None = None
    origin: str | None = None  # the checkpoint that --train.resume named, once this run has started from it


class Run(NamedTuple):
    """Everything that the training loop works with."""

    cfg: Config
    fabric: Fabric
    model: _FabricModule
    criterion: SetCriterion
    optimizer: _FabricOptimizer
    scheduler: LambdaLR
    train_loader: TrainLoader
    val_loader: EvalLoader
    folder: Path
    lock: RunLock | None  # held by rank 0 while the process lives
    state: State
    total_steps: int
    softmax_steps: int  # that train with softmax before the configured mapping
    preemption: Preemption
    notes: list[str]  # to be said at the start: about the initial weights, the resumption, memory
    ema: EMA | None = None  # the moving average of the weights, which is evaluated (optim.ema)

    def epoch(self) -> float:
        """Epochs done so far, with the fraction of the current one."""
        return self.state.epoch + self.state.step_in_epoch / self.train_loader.steps_per_epoch


class Step(NamedTuple):
    """One optimizer step whose gradient is in the parameters and whose update is still to come."""

    number: int  # from 1
    micro_batches: list[MicroBatch]
    normalizers: Tensor  # (2,) num_boxes, class_weight_sum of the effective batch
    dropout_seed: int
    statistics: BatchStatistics  # of batch norm, before this step
    losses: Losses
    grad_norm: Tensor  # () before clipping
    finite: bool  # whether the gradient is, the same on every rank
    stop_requested: bool  # on any rank
    unreadable: bool  # whether any rank could not read an image of this step
