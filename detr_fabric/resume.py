"""Where a run stands, how that is saved, and how a later process goes on from there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricOptimizer
from torch.optim.lr_scheduler import LambdaLR

from detr_fabric.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint
from detr_fabric.config import Config
from detr_fabric.data.annotations import Annotations
from detr_fabric.data.loader import TrainLoader
from detr_fabric.errors import UserError

if TYPE_CHECKING:
    from detr_fabric.loop import Run

HARMLESS = {  # settings that may change between two halves of a run, whole sections or single fields
    *("eval", "wandb", "data.root", "data.train_images", "data.train_annotations", "data.val_images"),
    *(
        "data.val_annotations",
        "data.val_limit",
        "data.validate_on_train",
        "data.bad_images",
        "data.max_batch_pixels",
        "data.workers",
        "data.shapes_dir",
    ),
    *("model.backbone_weights", "model.checkpoint", "model.gradient_checkpointing"),
    *("train.name", "train.run_dir", "train.accelerator", "train.devices", "train.resume", "train.log_every"),
    *(
        "train.checkpoint_every",
        "train.checkpoint_minutes",
        "train.keep_every",
        "train.deterministic",
        "train.on_nonfinite",
        "train.max_nonfinite",
        "train.requeue",
        "train.allow_config_change",
        "train.compile",
        "train.preflight",
    ),
}
GLOBAL_BATCH = {"train.batch_size", "train.accumulate"}  # harmless while their product with the ranks stays the same
LENGTH = {"train.epochs", "train.max_steps"}  # harmless unless the schedule depends on the end


@dataclass
class State:
    """Where a run stands; with weights, optimizer and config it is all that a resumed run needs.

    Data order, augmentation and dropout are functions of (seed, epoch, step, rank), so no generator is stored.
    """

    epoch: int = 0
    step: int = 0  # optimizer steps in all
    step_in_epoch: int = 0
    evaluated: int = 0  # the step of the last evaluation
    best_ap: float = -1.0
    skipped: int = 0  # times that another image took the place of one that could not be read, on all ranks
    dropped: int = 0  # steps that were left out because something was not finite
    dropped_in_a_row: int = 0  # of these the latest, with no good step since
    wandb_run_id: str | None = None


class Saver:
    """Writes last.ckpt and its copies on rank 0. What can't be written is said, and tried again at the next occasion:
    after checkpoint_minutes, or at the next epoch's end."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._seconds = 60 * run.cfg.train.checkpoint_minutes
        self._last_try = time.monotonic()
        self._best_ap = run.state.best_ap  # of best.ckpt
        self.failed = False  # whether the state of the last call is not on the disk

    def due(self) -> bool:
        return self._run.fabric.is_global_zero and time.monotonic() - self._last_try >= self._seconds

    def save(self, *copies: str) -> None:
        """Writes last.ckpt and gives it these names too. Other ranks return at once: they meet in the next step."""
        run = self._run
        if not run.fabric.is_global_zero:
            return
        content = {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "lr_scheduler": run.scheduler.state_dict(),
            "precision": run.fabric.strategy.precision.state_dict(),
            "state": asdict(run.state),
            "epoch": run.state.epoch,
            "config": run.cfg.to_dict(),
            "categories": run.train_set.categories.to_dict(),
            "data": fingerprint(run.train_set.annotations),
            "world_size": run.fabric.world_size,
            "global_batch": run.train_loader.global_batch,
            "steps_per_epoch": run.train_loader.steps_per_epoch,
        }
        last = run.folder / "last.ckpt"
        try:
            save_checkpoint(last, content)
            for name in copies:
                copy_checkpoint(last, run.folder / name)
            self.failed, self._best_ap = False, run.state.best_ap
        except (OSError, RuntimeError) as error:  # torch wraps what the system says
            reason = str(error.__cause__ or error.__context__ or error).splitlines()[0]
            self._say(
                f"step {run.state.step}: {last} can't be written ({reason}); training goes on, a later try follows"
            )
            self.failed = True
            run.state.best_ap = self._best_ap  # the next evaluation has to beat what is on the disk
        self._last_try = time.monotonic()


def fingerprint(annotations: Annotations) -> str:
    """What tells one data set from another: images, boxes and labels, but not where they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (annotations.image_ids, annotations.offsets, annotations.labels, annotations.boxes):
        digest.update(array.tobytes())
    return digest.hexdigest()


def checkpoint_exists(cfg: Config, folder: Path) -> bool:
    """Whether this run goes on from a checkpoint. Raises UserError when one is asked for that isn't there."""
    if cfg.train.resume not in (None, "auto"):
        return True
    found = any((folder / name).is_file() for name in ("last.ckpt", "previous.ckpt"))
    if cfg.train.resume == "auto" and not found:
        last = folder / "last.ckpt"
        raise UserError(f"--train.resume auto: {last} does not exist; name the run's folder with --train.run-dir")
    return found


def read_checkpoint(cfg: Config, folder: Path, notes: list[str]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to go on from: the named one, else last.ckpt, else previous.ckpt, which is noted."""
    if cfg.train.resume not in (None, "auto"):
        path = Path(str(cfg.train.resume))
        return path, load_checkpoint(path)
    last, previous = folder / "last.ckpt", folder / "previous.ckpt"
    try:
        return last, load_checkpoint(last)
    except UserError as error:
        if not previous.is_file():
            raise
        content = load_checkpoint(previous)
        notes.append(f"resume  {error}; going on from {previous.name}")
        return previous, content


def restore_state(
    content: dict[str, Any], source: Path, cfg: Config, annotations: Annotations, loader: TrainLoader, notes: list[str]
) -> State:
    """The stored State, in steps of this run's size. Differences of settings are noted.

    Raises UserError for differences that would make it another run, unless train.allow_config_change.
    """
    state = State(**content["state"])
    old_batch, old_steps = content["global_batch"], content["steps_per_epoch"]
    batch, steps = loader.global_batch, loader.steps_per_epoch
    try:
        before = Config.from_dict(content["config"]).to_dict()
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    harmful = [] if content["data"] == fingerprint(annotations) else ["the training data are others"]
    for name, was, now in differences(before, cfg.to_dict()):
        notes.append(f"resume  {name}: {was} -> {now}")
        harmless = name in HARMLESS or name.partition(".")[0] in HARMLESS
        if name in GLOBAL_BATCH:
            harmless = old_batch == batch
        if name in LENGTH:
            harmless = cfg.optim.schedule != "one-cycle"
        if not harmless:
            harmful.append(f"--{name.replace('_', '-')} was {was} and is now {now}")
    if harmful and not cfg.train.allow_config_change:
        raise UserError(
            f"{source} is of a run with other settings: {'; '.join(harmful)}. Give the same again, or go on all the "
            "same with --train.allow-config-change"
        )
    inside = state.step_in_epoch not in (0, old_steps)
    if content["world_size"] != loader.world or old_batch != batch:
        effect = "the same images in every step, summed in another order"
        if old_batch != batch:
            effect = f"{batch} images a step instead of {old_batch}"
            effect += ", from inside an epoch: a few images may come twice" if inside else ""
        notes.append(f"resume  {content['world_size']} -> {loader.world} ranks: {effect}")
    if old_batch != batch:
        state.step_in_epoch = (
            min(state.step_in_epoch * old_batch // batch, steps) if inside else (steps if state.step_in_epoch else 0)
        )
    return state


def differences(
    before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, object, object]]:
    """section.field, old and new value of every setting that differs."""
    for section, values in now.items():
        for field, value in values.items():
            if before[section][field] != value:
                yield f"{section}.{field}", before[section][field], value


def restore_optimizer(
    content: dict[str, Any], source: Path, fabric: Fabric, optimizer: _FabricOptimizer, scheduler: LambdaLR, steps: int
) -> None:
    """Moments and loss scale from the checkpoint; learning rates and the like from the settings, after `steps`."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(content["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{source}: its optimizer does not fit ({error}); train the same parts of the model") from error
    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    rates = [rate * factor(steps) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, values, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(values)
        group["lr"] = rate
    scheduler._last_lr = rates
    fabric.strategy.precision.load_state_dict(content["precision"])
