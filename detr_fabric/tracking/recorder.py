"""What a run leaves behind while it goes: config.json, starts.jsonl, log.jsonl, W&B, the console and the picture panel.

Names of the logged values, the same in log.jsonl and W&B:

    train/loss                 total, weighted; training losses are means over the steps since the last record
    train/loss_ce …            raw, DETR's names         train/weighted/loss_ce …   times their weights
    lr/<group>                 learning rates            grad_norm          of the last step, before clipping
    images_per_second          of all ranks together     data_wait          fraction of the time spent waiting for data
    memory_gb                  peak on the device, in GiB
    val/AP, val/AP50 …         the 12 COCO statistics    val/AP_class/<name>        AP of one class
    val/loss, val/loss_ce …    of the whole validation set; val/class_error, val/cardinality_error
    val/seconds, val/seconds_scoring                     of an evaluation, and the part spent on scoring
    skipped_images             unreadable images so far, with `--data.bad-images skip`; a record `skipped` names each
    dropped_steps              so far, at each step that was dropped because something was not finite
    attention/<site>/layer<l>/<measure>, alpha/<site>/layer<l>[/head<h>]    see analysis/statistics.py

Every record also has `step` (optimizer steps done) and `epoch`. W&B also gets `val/AP_table` (class, AP),
`attention/heads` (one row per head) and `val/panel` (images with predicted and ground-truth boxes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch

from detr_fabric.analysis.statistics import attention_statistics, mean_alphas, sample
from detr_fabric.data.batch import MicroBatch
from detr_fabric.draw import draw, grid
from detr_fabric.errors import UserError
from detr_fabric.evaluate.detect import Evaluation
from detr_fabric.evaluate.diagnosis import diagnose
from detr_fabric.evaluate.match import match
from detr_fabric.evaluate.outputs import picture_panel, save_evaluation
from detr_fabric.model.parameters import count_parameters
from detr_fabric.runtime.files import replace_text
from detr_fabric.runtime.memory import peak_memory
from detr_fabric.runtime.nonfinite import named_values
from detr_fabric.runtime.ranks import mean_over_ranks, of_every_rank
from detr_fabric.runtime.run import Run, Step
from detr_fabric.terminal import decimal
from detr_fabric.tracking.console import Progress
from detr_fabric.tracking.jsonl import RunLog
from detr_fabric.tracking.starts import note_start
from detr_fabric.tracking.wandb import WandbLogger, git_commit

PANEL_THRESHOLD = {"softmax": 0.7, "focal": 0.3}  # the scores of focal loss are lower


class Recorder:
    """Sends each record everywhere. Only rank 0 writes; every rank calls, because losses are averaged over ranks."""

    def __init__(self, run: Run) -> None:
        """Raises UserError when the run's folder can't be written to."""
        self.run = run
        cfg, state, rank_zero = run.cfg, run.state, run.fabric.is_global_zero
        steps_left = state.step_in_epoch + run.total_steps - state.step
        epochs = state.epoch + math.ceil(steps_left / run.train_loader.steps_per_epoch)
        self.progress = Progress(epochs, run.total_steps, state.step, enabled=rank_zero)
        self.say = self.progress.say
        self._named: set[str] = set()  # unreadable images that the console has named
        self.log: RunLog | None = None
        self.wandb: WandbLogger | None = None
        if rank_zero:
            commit = git_commit()
            self.log = self._open_log(commit)
            facts = {"git_commit": commit, "parameters": count_parameters(run.model)}
            self.wandb = WandbLogger(cfg, run.folder, state.wandb_run_id, facts, self.say)
        state.wandb_run_id = run.fabric.broadcast(self.wandb.run_id if self.wandb else None)

    def _open_log(self, commit: str | None) -> RunLog:
        run, cfg = self.run, self.run.cfg
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            replace_text(run.folder / "config.json", json.dumps(cfg.to_dict(), indent=1) + "\n")
            if cfg.data.val_fraction is not None:
                image_ids = run.val_loader.dataset.image_ids
                (run.folder / "validation_images.json").write_text(json.dumps(image_ids) + "\n")
            note_start(run, commit)
            return RunLog(run.folder / "log.jsonl", run.state.step, run.state.evaluated, self.say)
        except OSError as error:
            raise UserError(f"{run.folder}: {error.strerror}; choose another folder with --train.run-dir") from error

    def __enter__(self) -> Recorder:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, error, trace)
        if self.log is not None:
            self.log.close()
        if self.wandb is not None:
            self.wandb.finalize("success" if error is None else "failed")

    def record(self, values: Mapping[str, float]) -> None:
        """One record of named values into log.jsonl and W&B."""
        step, epoch = self.run.state.step, self.run.epoch()
        if self.log is not None:
            self.log.write(values, step, epoch)
        if self.wandb is not None:
            self.wandb.log_metrics({**values, "epoch": epoch}, step)

    def count(self, step: Step) -> None:
        """Adds a step's losses, averaged over ranks, to those of the next record. Nothing waits for the device."""
        state = self.run.state
        if step.finite:
            values = mean_over_ranks(torch.stack(list(named_values(step.losses).values())))
            before = state.window_sums
            if before is None or before.shape != values.shape:  # a resumed run may have other losses
                before, state.window_steps = torch.zeros_like(values), 0
            state.window_sums = before.to(values.device) + values
            state.window_steps += 1

    def training(self, step: Step, speed: Mapping[str, float]) -> None:
        """Losses since the last record, averaged over steps and ranks, with learning rates, the step's gradient norm,
        speed and memory."""
        run, state = self.run, self.run.state
        record: dict[str, float] = {}
        if state.window_sums is not None:  # else every step was dropped
            means = (state.window_sums / state.window_steps).tolist()
            record = {f"train/{name}": mean for name, mean in zip(named_values(step.losses), means, strict=True)}
            for name in step.losses.losses:
                record[f"train/weighted/{name}"] = run.criterion.weight(name) * record[f"train/{name}"]
        if state.step % run.cfg.train.log_every == 0:  # not at an early end, which may be resumed
            state.window_steps, state.window_sums = 0, None
        record |= {f"lr/{group['name']}": group["lr"] for group in run.optimizer.param_groups}
        record |= mean_alphas(run.model)
        record |= {"grad_norm": step.grad_norm.item(), **speed, "memory_gb": peak_memory(run.fabric.device)}
        if run.state.skipped:
            record["skipped_images"] = run.state.skipped
        if run.cfg.train.compile:
            record["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        self.record(record)
        self.progress.update(run.state.epoch, run.state.step, record)

    def skipped(self, micro_batches: list[MicroBatch]) -> int:
        """Names the images of this step that a rank could not read. Returns their number over all ranks."""
        mine = [t.read_error for _, targets in micro_batches for t in targets if t.read_error is not None]
        errors = [error for rank in of_every_rank(mine) for error in rank]
        self._name(errors)
        return len(errors)

    def _name(self, read_errors: list[str]) -> None:
        """Every unreadable image into log.jsonl every time, and onto the console once."""
        for error in read_errors:
            if self.log is not None:
                self.log.write({"skipped": error}, self.run.state.step, self.run.epoch())
            if error not in self._named:
                self._named.add(error)
                self.say(f"skipped {error}")

    def dropped(self, sentence: str) -> None:
        """A step that was dropped: the sentence to the console and log.jsonl, the count so far also to W&B."""
        state, epoch = self.run.state, self.run.epoch()
        self.say(sentence)
        if self.log is not None:
            self.log.write({"dropped_steps": state.dropped, "dropped": sentence}, state.step, epoch)
        if self.wandb is not None:
            self.wandb.log_metrics({"dropped_steps": state.dropped, "epoch": epoch}, state.step)

    def evaluation(self, evaluation: Evaluation, losses: Mapping[str, float]) -> None:
        """Scores, losses, attention statistics and the panel, on rank 0: to the folder, the logs and the console."""
        assert self.wandb is not None, "only rank 0 has an evaluation"
        run, val_set, step = self.run, self.run.val_loader.dataset, self.run.state.step
        values = {f"val/{name}": value for name, value in (evaluation.stats | dict(losses)).items()}
        values |= {f"val/AP_class/{name}": value for name, value in evaluation.per_class.items()}
        images = sample(val_set, run.cfg.eval.attention_images)
        readable = [batch for batch in images if batch[1][0].read_error is None]
        if readable:
            attention = attention_statistics(run.model, readable, run.criterion.matcher)
            values |= attention.curves()
            self.wandb.log_table("attention/heads", *attention.table(), step)
        unread = ""
        if run.cfg.data.bad_images == "skip":
            self._name(evaluation.read_errors)
            values["val/skipped_images"] = skipped = len(evaluation.read_errors)
            unread = f"{skipped} unreadable images without detections, " * bool(skipped)
        seconds = {"val/seconds": evaluation.seconds, "val/seconds_scoring": evaluation.seconds_scoring}
        self.record(values | seconds)
        what = "evaluation" if run.ema is None else "evaluation of the moving average"
        try:
            more: dict[str, Any] = {"weights": "raw" if run.ema is None else "ema"}
            if step >= run.total_steps:
                more |= self._diagnosis(evaluation)
            save_evaluation(run.folder / "evaluation.json", evaluation, step, more)
            self._panel(evaluation)
        except Exception as error:  # no picture or file of results is worth days of training
            reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
            self.say(f"{run.folder}: {reason}; training goes on, the evaluation is in log.jsonl")
        shown = "  ".join(f"{name} {decimal(evaluation.stats[name])}" for name in ("AP", "AP50", "AP75", "AR100"))
        self.say(f"{what} at step {step}: {shown}  ({unread}{evaluation.seconds:.1f} s)")

    def _diagnosis(self, evaluation: Evaluation) -> dict[str, Any]:
        """What the scores don't say, for the last evaluation alone: it takes seconds for COCO's 5,000 images."""
        val_set = self.run.val_loader.dataset
        matches = match(val_set.annotations, evaluation.detections)
        return diagnose(matches, val_set.categories)

    def _panel(self, evaluation: Evaluation) -> None:
        """AP by class, and the first validation images with their detections."""
        assert self.wandb is not None
        run, val_set, step = self.run, self.run.val_loader.dataset, self.run.state.step
        names = [val_set.categories.name(label) for label in range(val_set.categories.num_classes)]
        indices = range(min(run.cfg.wandb.panel_images, len(val_set)))
        panel = picture_panel(val_set, evaluation.detections, indices, PANEL_THRESHOLD[run.cfg.loss.kind])
        rows = [[name, ap] for name, ap in evaluation.per_class.items()]
        self.wandb.log_table("val/AP_table", ["class", "AP"], rows, step)
        self.wandb.log_pictures("val/panel", panel, names, step)
        if panel:
            legible = val_set.categories.legible_names()
            sheet = grid([draw(picture, legible) for picture in panel], [picture.caption for picture in panel])
            sheet.save(run.folder / "panel.png")

    def finish(self) -> None:
        """What there is to say at the end of training: the best score, where things are, and what comes next."""
        run, best = self.run, self.run.folder / "best.ckpt"
        average = "" if run.ema is None else " (of the moving average)"
        self.say(
            f"done    best AP {decimal(run.state.best_ap)}{average}: {best}, pictures in {run.folder / 'panel.png'}"
        )
        self.say(f"next    python -m detr_fabric.evaluate {best} --confusion 0.5 --worst 16")
        if self.run.state.skipped:
            log = self.run.folder / "log.jsonl"
            self.say(f"images were skipped {self.run.state.skipped} times, named in {log}")

    def preempted(self) -> None:
        """Marks the W&B run as one that will come back."""
        added = "" if self.run.cfg.train.run_dir else f" with --train.run-dir {self.run.folder}"
        self.say(f"stopped after step {self.run.state.step}; the same command{added} goes on from there")
        if self.wandb is not None:
            self.wandb.mark_preempting()
