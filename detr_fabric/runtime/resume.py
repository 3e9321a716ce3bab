"""How a run's state is saved, and how a later process goes on from there."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricOptimizer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from detr_fabric.config import Config, changes_results
from detr_fabric.data.formats.annotations import Annotations
from detr_fabric.data.formats.categories import listed
from detr_fabric.data.loader import TrainLoader
from detr_fabric.errors import UserError
from detr_fabric.runtime.checkpoint import load_checkpoint, load_model_state, save_checkpoint
from detr_fabric.runtime.contents import check_resumable, moments
from detr_fabric.runtime.ema import EMA
from detr_fabric.runtime.run import Run, State


class Saver:
    """Writes last.ckpt and its other names, on rank 0. What can't be written is said and tried again at the next
    occasion: after checkpoint_minutes, or at the end of the next epoch."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._seconds = 60 * run.cfg.train.checkpoint_minutes
        self._last_try = time.monotonic()
        self._best_ap = run.state.best_ap  # of the best.ckpt on disk
        self.failed = False  # whether the latest state is not on disk
        self.moved: str | None = None  # a sentence, once somebody has renamed the folder

    def due(self) -> bool:
        if not self._run.fabric.is_global_zero:
            return False
        return time.monotonic() - self._last_try >= self._seconds or self.folder() != self._run.folder

    def folder(self) -> Path:
        """Where the run's folder is now. Once it was renamed, the run is to stop and nothing goes to its old place."""
        run = self._run
        moved = run.lock.moved_to() if run.lock is not None else None
        if moved is None:
            return run.folder
        self.moved = (
            f"{run.folder} was renamed to {moved} while the run wrote to it; saved there at step {run.state.step}: "
            f"go on with --train.run-dir {moved}"
        )
        run.preemption.requested = run.preemption.requested or self.moved
        return moved

    def save(self, *names: str) -> None:
        """Writes last.ckpt, also under these names. Other ranks return at once: they meet in the next step."""
        run = self._run
        if not run.fabric.is_global_zero:
            return
        dataset = run.train_loader.dataset
        content = {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "precision": run.fabric.strategy.precision.state_dict(),
            "state": asdict(run.state),
            "config": run.cfg.to_dict(),
            "categories": dataset.categories.to_dict(),
            "fingerprint": fingerprint(dataset.annotations),
            "world_size": run.fabric.world_size,
            "global_batch": run.train_loader.global_batch,
            "steps_per_epoch": run.train_loader.steps_per_epoch,
            **({} if run.ema is None else {"ema": run.ema.average}),
            **({} if dataset.augment is None else {"augment": dataset.augment.digest}),
        }
        last = self.folder() / "last.ckpt"
        try:
            save_checkpoint(last, content, names=names)
            self.failed, self._best_ap = False, run.state.best_ap
        except (OSError, RuntimeError) as error:  # torch wraps what the system says
            reason = str(error.__cause__ or error.__context__ or error).splitlines()[0]
            self._say(f"step {run.state.step}: {last} can't be written ({reason}); training goes on and tries again")
            self.failed = True
            run.state.best_ap = self._best_ap  # the next evaluation has to beat what is on disk
        self._last_try = time.monotonic()


class Checkpoint(NamedTuple):
    """A file to go on from."""

    path: Path
    content: dict[str, Any]
    fork: bool  # of another run: a new W&B run, and the best score starts anew


def find_checkpoint(cfg: Config, folder: Path, rank_zero: bool, notes: list[str]) -> Checkpoint | None:
    """What this run goes on from: the folder's last.ckpt (else its previous.ckpt, which is noted), or the file of
    --train.resume where the folder has none yet; None for a new run.

    A file of the folder itself goes back to it, once: what comes later is kept under other names, which rank 0 writes.
    Raises UserError for a checkpoint that is missing or damaged.
    """
    asked = cfg.train.resume
    file = Path(asked) if asked not in (None, "auto") else None
    last, previous = folder / "last.ckpt", folder / "previous.ckpt"
    if not last.is_file() and not previous.is_file():
        if asked == "auto":
            raise UserError(f"--train.resume auto: {last} does not exist; name the run's folder with --train.run-dir")
        return (
            None
            if file is None
            else Checkpoint(file, load_resumable(file), fork=file.parent.resolve() != folder.resolve())
        )
    own = _last_or_previous(last, previous, notes)
    if file is None or own.content["state"].get("origin") == str(file):
        return own
    if file.parent.resolve() == folder.resolve():
        return own if file.name == last.name else _go_back(file, own, folder, rank_zero, notes)
    notes.append(f"resume  {folder} has a checkpoint of its own, so {file} is not read; a new folder starts from it")
    return own


def load_resumable(path: Path) -> dict[str, Any]:
    """A checkpoint of this package that has all that a run goes on from. Raises UserError for any other file."""
    content = load_checkpoint(path)
    check_resumable(content, path)
    return content


def _last_or_previous(last: Path, previous: Path, notes: list[str]) -> Checkpoint:
    try:
        return Checkpoint(last, load_resumable(last), fork=False)
    except UserError as error:
        if not previous.is_file():
            raise
        content = load_resumable(previous)
        notes.append(f"resume  {error}; going on from {previous.name}")
        return Checkpoint(previous, content, fork=False)


def _go_back(file: Path, own: Checkpoint, folder: Path, rank_zero: bool, notes: list[str]) -> Checkpoint:
    """The named checkpoint of the folder itself. The later one and the log are kept."""
    content, step = load_resumable(file), own.content["state"]["step"]
    kept = [(own.path, folder / f"before_going_back_{step}.ckpt")]
    if (folder / "log.jsonl").is_file():
        kept.append((folder / "log.jsonl", folder / f"before_going_back_{step}.jsonl"))
    for source, target in kept if rank_zero else ():
        shutil.copyfile(source, target)
    names = " and ".join(target.name for _, target in kept)
    notes.append(
        f"resume  going back from step {step} to {content['state']['step']} of {file.name}; {names} keep the rest"
    )
    return Checkpoint(file, content, fork=False)


def as_started(cfg: Config, checkpoint: Checkpoint | None) -> Config:
    """The settings with the defaults of the version that started the run: before softmax first there was none."""
    if checkpoint is None or checkpoint.fork or "softmax_first" in checkpoint.content["config"].get("attn", {}):
        return cfg
    return replace(cfg, attn=replace(cfg.attn, softmax_first=0.0))


def restore_state(
    checkpoint: Checkpoint, cfg: Config, annotations: Annotations, loader: TrainLoader, notes: list[str]
) -> State:
    """The stored State. Settings that differ are noted.

    Raises UserError for differences that would make it another run, unless train.allow_config_change. With another
    number of images a step it then goes on from the start of the interrupted epoch.
    """
    path, content, fork = checkpoint
    known = {field.name for field in fields(State)}
    state = State(**{name: value for name, value in content["state"].items() if name in known})
    if fork:
        state.best_ap, state.wandb_run_id = State.best_ap, None
        notes.append(f"resume  starts from {path}, as a run of its own")
    if cfg.train.resume is not None and path == Path(cfg.train.resume):
        state.origin = str(path)
    before = Config.from_dict(content["config"])
    harmful = [] if _same_data(content, annotations) else ["the training data have changed"]
    names, stored_names = annotations.categories.names, content["categories"]["names"]
    if list(names) != stored_names:
        harmful.append(f"the classes were {listed(stored_names)} and are now {listed(names)}")
    for name, was, now in differences(before, cfg):
        notes.append(f"resume  {name}: {was} -> {now}")
        if changes_results(name, cfg):
            harmful.append(f"--{name.replace('_', '-')} was {was} and is now {now}")
    if content.get("augment") != (None if loader.dataset.augment is None else loader.dataset.augment.digest):
        was, now = before.data.augment, cfg.data.augment
        harmful.append(f"{now} has another content" if was == now else f"--data.augment was {was} and is now {now}")
    batch, old_batch, old_steps = loader.global_batch, content["global_batch"], content["steps_per_epoch"]
    if batch != old_batch:
        harmful.append(f"a step had {old_batch} images and now has {batch}")
    if harmful and not cfg.train.allow_config_change:
        raise UserError(
            f"{path} is of a run with other settings: {'; '.join(harmful)}. Give the same settings again, or accept "
            "the change with --train.allow-config-change"
        )
    was, now = content["world_size"], loader.shard.world
    ranks = f"resume  {was} -> {now} ranks: " if was != now else "resume  "
    if batch != old_batch or loader.steps_per_epoch != old_steps:
        finished = state.step_in_epoch == old_steps
        where = "" if finished or not state.step_in_epoch else f", from the start of epoch {state.epoch + 1}"
        state.step_in_epoch = loader.steps_per_epoch if finished else 0
        change = f"{batch} images a step instead of {old_batch}"
        if batch == old_batch:
            change = f"{loader.steps_per_epoch} steps an epoch instead of {old_steps}"
        notes.append(f"{ranks}{change}{where}")
    elif was != now:
        notes.append(f"{ranks}the same images in every step, summed in another order")
    return state


def differences(before: Config, now: Config) -> Iterator[tuple[str, object, object]]:
    """section.field, old and new value of every setting that differs."""
    old_sections = before.to_dict()
    for section, values in now.to_dict().items():
        for field, value in values.items():
            if old_sections[section][field] != value:
                yield f"{section}.{field}", old_sections[section][field], value


def fingerprint(annotations: Annotations) -> str:
    """What tells one data set from another: everything that training reads, but not where it lies."""
    names = "\0".join(annotations.file_names.tolist()).encode("utf-8", "surrogateescape")
    turned = [annotations.turned.tobytes()] if annotations.turned.any() else []  # most data keep their earlier digest
    return _digest(annotations, annotations.crowd.tobytes(), names, *turned)


def _same_data(content: dict[str, Any], annotations: Annotations) -> bool:
    if "fingerprint" in content:
        return bool(content["fingerprint"] == fingerprint(annotations))
    return bool(content["data"] == _digest(annotations))  # written before fingerprints covered crowds and names


def _digest(annotations: Annotations, *more: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in (annotations.image_ids, annotations.offsets, annotations.labels, annotations.boxes):
        digest.update(array.tobytes())
    for part in more:
        digest.update(part)
    return digest.hexdigest()


def restore_optimizer(
    checkpoint: Checkpoint, fabric: Fabric, optimizer: _FabricOptimizer, scheduler: LambdaLR, steps: int
) -> None:
    """Moments and loss scale from the checkpoint; learning rates and the like from the settings, after `steps`.

    The precision may be another one: a run that is new to fp16 starts with its usual loss scale.
    """
    path, content, _ = checkpoint
    optimizer.load_state_dict(moments(content["optimizer"], optimizer.optimizer, path))
    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    rates = [rate * factor(steps) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    if content["precision"]:
        fabric.strategy.precision.load_state_dict(content["precision"])


def restore_ema(checkpoint: Checkpoint, model: nn.Module, ema: EMA | None) -> None:
    """The moving average from the checkpoint. Where it has none, the average starts from its weights."""
    if ema is not None and "ema" in checkpoint.content:
        with ema.swapped():
            load_model_state(model, checkpoint.content["ema"], f"{checkpoint.path}, its moving average")
