"""From a config to everything that a run works with, and what it says at the start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning_fabric import Fabric

from detr_fabric.config import Config
from detr_fabric.data.build import build_datasets
from detr_fabric.data.doubts import doubts
from detr_fabric.data.loader import EvalLoader, TrainLoader
from detr_fabric.data.orientation_tags import orientation_tags
from detr_fabric.data.padding_estimate import padding_summary
from detr_fabric.data.sampler import Shard
from detr_fabric.data.summary import summary
from detr_fabric.errors import UserError
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.model.build import build_model
from detr_fabric.model.kernels import try_kernels
from detr_fabric.model.parameters import count_parameters
from detr_fabric.optimizer import build_optimizer, build_scheduler
from detr_fabric.runtime.arithmetic import allow_tf32, arithmetic
from detr_fabric.runtime.checkpoint import load_model_state
from detr_fabric.runtime.ema import EMA
from detr_fabric.runtime.finetune import load_weights
from detr_fabric.runtime.launch import build_fabric, make_deterministic, meet, settle_reduction_order
from detr_fabric.runtime.notes import notes
from detr_fabric.runtime.preemption import Preemption
from detr_fabric.runtime.preflight import preflight
from detr_fabric.runtime.resume import as_started, find_checkpoint, restore_ema, restore_optimizer, restore_state
from detr_fabric.runtime.run import Run, State
from detr_fabric.runtime.run_dir import take_folder
from detr_fabric.terminal import noun


def setup(cfg: Config, preemption: Preemption) -> Run:
    """Builds what a resolved config asks for. Raises UserError, on every rank alike, for what the user can correct."""
    # Devices and ranks.
    train = cfg.train
    if train.deterministic:
        make_deterministic()
    allow_tf32(train.tf32)
    fabric = build_fabric(
        train.accelerator, train.devices, train.precision, broadcast_buffers=cfg.model.norm == "batch"
    )
    meet(fabric)

    # Data, the run's folder, and the checkpoint to go on from.
    train_loader, val_loader = build_loaders(cfg, fabric)
    train_set, said = train_loader.dataset, list[str]()
    folder, lock = take_folder(fabric, cfg)
    checkpoint = find_checkpoint(cfg, folder, fabric.is_global_zero, said)
    cfg = as_started(cfg, checkpoint)

    # Model, criterion, optimizer, schedule.
    torch.manual_seed(train.seed)
    num_classes = train_set.categories.num_classes
    model = build_model(cfg.model, cfg.attn, num_classes, checkpoint is None, cfg.loss.focal)
    if checkpoint is None and cfg.model.checkpoint is not None:
        said += load_weights(model, cfg.model.checkpoint, train_set.categories, cfg.data.aliases)
    model.to(memory_format=torch.channels_last)
    criterion = SetCriterion(num_classes, cfg.loss).to(fabric.device)
    optimizer = build_optimizer(model, cfg.optim, fused=train.precision != "16-mixed")
    epoch_steps = train_loader.steps_per_epoch
    planned = train.max_steps or train.epochs * epoch_steps
    scheduler = build_scheduler(optimizer, cfg.optim, epoch_steps, planned)

    # Where the run stands, and how far it goes.
    state = State()
    if checkpoint is not None:
        load_model_state(model, checkpoint.content["model"], str(checkpoint.path))
        state = restore_state(checkpoint, cfg, train_set.annotations, train_loader, said)
    position = state.epoch * epoch_steps + state.step_in_epoch  # in steps of this run's size
    earlier = 0 if train.max_steps else state.step - position  # earlier steps may have had another number of images
    total_steps = planned + earlier
    softmax_steps = max(0, round(cfg.attn.softmax_first * planned) + earlier) if cfg.attn.softmax_first else 0
    if state.step >= total_steps and state.evaluated == state.step:
        raise UserError(f"{folder}: all {state.step} steps are done, nothing is left; raise --train.epochs")

    # Onto the devices.
    if fabric.device.type == "cuda":
        precision, width = fabric.strategy.precision.precision, cfg.model.hidden_dim // cfg.model.heads
        for each in (width,) if cfg.model.cross_attention == "original" else (width, 2 * width):
            said += try_kernels(cfg.attn, fabric.device, precision, each)
    if train.compile:
        model.compile()  # in place, so that names stay; batches of a second shape make the sizes dynamic, for good
    model, optimizer = fabric.setup(model, optimizer)
    ema = None if cfg.optim.ema is None else EMA(model, cfg.optim.ema)
    if checkpoint is not None:
        restore_optimizer(checkpoint, fabric, optimizer, scheduler, position)
        restore_ema(checkpoint, model, ema)
    run = Run(
        cfg=cfg,
        fabric=fabric,
        model=model,
        criterion=criterion,
        optimizer=optimizer,
        scheduler=scheduler,
        train_loader=train_loader,
        val_loader=val_loader,
        folder=folder,
        lock=lock,
        state=state,
        total_steps=total_steps,
        softmax_steps=softmax_steps,
        preemption=preemption,
        notes=said,
        ema=ema,
    )
    wanted = fabric.device.type == "cuda" if train.preflight is None else train.preflight
    if wanted:
        said.append(preflight(run))
    settle_reduction_order(fabric, model)
    return run


def build_loaders(cfg: Config, fabric: Fabric) -> tuple[TrainLoader, EvalLoader]:
    """This rank's training and validation batches."""
    train, data = cfg.train, cfg.data
    train_set, val_set = build_datasets(data, train.seed)
    shard, pin = Shard(fabric.global_rank, fabric.world_size), fabric.device.type == "cuda"
    train_loader = TrainLoader(
        train_set, batch_size=train.batch_size, accumulate=train.accumulate, data=data, shard=shard, pin=pin
    )
    val_loader = EvalLoader(val_set, batch_size=cfg.eval.batch_size, data=data, shard=shard, pin=pin)
    return train_loader, val_loader


def introduce(run: Run, say: Callable[[str], None]) -> None:
    """Says in a few lines what is about to be trained on what."""
    cfg, train, world = run.cfg, run.cfg.train, run.fabric.world_size
    train_set, val_set = run.train_loader.dataset, run.val_loader.dataset
    where = "built-in synthetic shapes, because no --data.root is given" if cfg.data.builtin else train_set.folder
    say(
        f"data    {where}: {len(train_set)} training and {len(val_set)} validation images, "
        f"{len(train_set.categories.ids)} {noun('class', len(train_set.categories.ids))}"
    )
    for name, data in (("train", train_set), ("val", val_set)):
        say(f"{name:8}{summary(data.annotations, cfg.model.num_queries)}")
        warnings = [f"warning: {doubt}" for doubt in doubts(data.annotations)]
        for remark in (*data.annotations.notes, *warnings, *orientation_tags(data)):
            say(f"{'':8}{remark}")
    say(f"padding {padding_summary(run.train_loader)}")
    parameters = count_parameters(run.model)
    start = cfg.model.checkpoint or cfg.model.backbone_weights
    norm = "frozen batch norm" if cfg.model.norm == "frozen" else "trained batch norm"
    say(
        f"model   {cfg.model.backbone} ({norm}; weights: {start}), {cfg.attn.kind} attention, "
        f"{'conditional cross-attention, ' * (cfg.model.cross_attention == 'conditional')}"
        f"{parameters['total'] / 1e6:.1f} M parameters, {parameters['trainable'] / 1e6:.1f} M trained"
    )
    say(
        f"steps   {run.total_steps} of {train.batch_size} images x {train.accumulate} accumulated x {world} ranks = "
        f"{train.batch_size * train.accumulate * world}, on "
        f"{arithmetic(run.fabric.device, run.fabric.strategy.precision.precision, train.tf32)}"
    )
    rates = ", ".join(f"{group['name']} {group['initial_lr']:g}" for group in run.optimizer.param_groups)
    ema = "" if run.ema is None else f"; evaluates a moving average of the weights (decay {run.ema.decay:g})"
    say(f"optim   learning rates {rates}, {cfg.optim.schedule} schedule, weight decay {cfg.optim.weight_decay:g}{ema}")
    if run.softmax_steps:
        own = "/".join(dict.fromkeys(cfg.attn.mappings))
        say(f"attn    trains with softmax up to step {run.softmax_steps}, then {own}, which evaluation always uses")
    say(f"folder  {run.folder}" + (f", resumed at step {run.state.step}" if run.state.step else ""))
    for note in notes(cfg, run.train_loader.steps_per_epoch) + run.notes:
        say(note)
