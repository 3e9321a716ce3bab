"""What a run leaves behind while it goes: its folder, log.jsonl, W&B and the console line, all written by rank 0.

The names of the logged values are listed in tracking.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn

from detr_fabric.analysis.statistics import attention_statistics, mean_alphas, sample
from detr_fabric.config import Config
from detr_fabric.data.coco import CocoDetection
from detr_fabric.data.loader import MicroBatch
from detr_fabric.errors import UserError
from detr_fabric.evaluation import Evaluation, picture_panel, save_evaluation
from detr_fabric.loss.criterion import Losses
from detr_fabric.memory import peak_memory
from detr_fabric.pictures import draw, grid
from detr_fabric.progress import Progress
from detr_fabric.tracking import RunLog, WandbLogger, git_commit

PANEL_THRESHOLD = 0.7


class Recorder:
    """Fans each record out. Only rank 0 writes; every rank calls, for losses are averaged over ranks."""

    def __init__(
        self,
        fabric: Fabric,
        cfg: Config,
        folder: Path,
        model: nn.Module,
        val_set: CocoDetection,
        steps_per_epoch: int,
        total_steps: int,
        step_offset: int,
        resumed_step: int,
        wandb_run_id: str | None,
    ) -> None:
        self.fabric, self.cfg, self.folder, self.model, self.val_set = fabric, cfg, folder, model, val_set
        self.steps_per_epoch, self.step_offset = steps_per_epoch, step_offset
        self.progress = Progress(cfg.train.epochs, total_steps, resumed_step, enabled=fabric.is_global_zero)
        self._named: set[str] = set()  # bad images that the console has named
        self.log: RunLog | None = None
        self.wandb: WandbLogger | None = None
        if fabric.is_global_zero:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "config.json").write_text(json.dumps(cfg.to_dict(), indent=1) + "\n")
                if cfg.data.val_fraction is not None:
                    (folder / "validation_images.json").write_text(json.dumps(val_set.image_ids) + "\n")
                self.log = RunLog(folder / "log.jsonl", resumed_step, self.progress.say)
            except OSError as error:
                raise UserError(f"{folder}: {error.strerror}; choose another folder with --train.run-dir") from error
            self.wandb = WandbLogger(
                folder,
                cfg.to_dict(),
                mode=cfg.wandb.mode,
                project=cfg.wandb.project,
                entity=cfg.wandb.entity,
                name=cfg.train.name,
                group=cfg.wandb.group,
                tags=cfg.wandb.tags,
                run_id=wandb_run_id,
                commit=git_commit(),
                parameters=count_parameters(model),
                say=self.progress.say,
            )
        self.wandb_run_id: str | None = fabric.broadcast(self.wandb.run_id if self.wandb else None)

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

    def preempted(self) -> None:
        """Marks the W&B run as one that will come back."""
        if self.wandb is not None:
            self.wandb.mark_preempting()

    def record(self, values: Mapping[str, float], step: int) -> None:
        """One record of named values into log.jsonl and W&B."""
        if self.log is not None:
            self.log.write(values, step, self._epoch(step))
        if self.wandb is not None:
            self.wandb.log_metrics({**values, "epoch": self._epoch(step)}, step)

    def _epoch(self, step: int) -> float:
        return (step + self.step_offset) / self.steps_per_epoch

    def skipped(self, micro_batches: list[MicroBatch], step: int) -> int:
        """Names the images of this step that a rank could not read. Returns their number over all ranks."""
        faults = [target.fault for _, targets in micro_batches for target in targets if target.fault is not None]
        if self.fabric.world_size > 1:
            ranks = [faults] * self.fabric.world_size
            torch.distributed.all_gather_object(ranks, faults)
            faults = [fault for rank in ranks for fault in rank]
        self._name(faults, step)
        return len(faults)

    def _name(self, faults: list[str], step: int) -> None:
        """Every bad image into log.jsonl every time, and onto the console once."""
        for fault in faults:
            if self.log is not None:
                self.log.write({"skipped": fault}, step, self._epoch(step))
            if fault not in self._named:
                self._named.add(fault)
                self.progress.say(f"skipped {fault}")

    def training(
        self,
        losses: Losses,
        weights: Mapping[str, float],
        grad_norm: Tensor,
        optimizer: _FabricOptimizer,
        speed: Mapping[str, float],
        step: int,
    ) -> None:
        """Losses of a step, averaged over ranks, with learning rates, gradient norm, speed and memory."""
        names = ["loss", *losses.parts]
        stacked = torch.stack([losses.total, *losses.parts.values()])
        mean = cast(Tensor, self.fabric.all_reduce(stacked, reduce_op="mean")).tolist()
        values = {f"train/{name}": value for name, value in zip(names, mean, strict=True)}
        for name, value in zip(names, mean, strict=True):
            base = name if name in weights else name.rpartition("_")[0]
            if base in weights:
                values[f"train/weighted/{name}"] = weights[base] * value
        values |= {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
        values |= mean_alphas(self.model)
        values |= {"grad_norm": grad_norm.item(), **speed, "memory_gb": peak_memory(self.fabric.device)}
        self.record(values, step)
        self.progress.update((step + self.step_offset - 1) // self.steps_per_epoch, step, values)

    def dropped(self, sentence: str, count: int, step: int) -> None:
        """A step that was left out: the sentence to the console and log.jsonl, the count so far to W&B as well."""
        self.progress.say(sentence)
        if self.log is not None:
            self.log.write({"dropped_steps": count, "dropped": sentence}, step, self._epoch(step))
        if self.wandb is not None:
            self.wandb.log_metrics({"dropped_steps": count, "epoch": self._epoch(step)}, step)

    def evaluation(self, evaluation: Evaluation, step: int) -> None:
        """Scores, what the attention does, and the panel: into the folder, log.jsonl, W&B and the console."""
        assert self.wandb is not None, "only rank 0 has an evaluation"
        values = {f"val/{name}": value for name, value in evaluation.stats.items()}
        values |= {f"val/AP_class/{name}": value for name, value in evaluation.per_class.items()}
        count, loss = self.cfg.eval.attention_images, self.cfg.loss
        readable = [batch for batch in sample(self.val_set, count) if batch[1][0].fault is None]
        if readable:
            costs = (loss.cost_class, loss.cost_bbox, loss.cost_giou)
            attention = attention_statistics(self.model, readable, costs)
            values |= attention.curves()
            self.wandb.log_table("attention/heads", *attention.table(), step)
        unread = ""
        if self.cfg.data.bad_images == "skip":
            self._name(evaluation.faults, step)
            values["val/skipped_images"] = len(evaluation.faults)
            unread = f"{len(evaluation.faults)} unreadable images without detections, " * bool(evaluation.faults)
        seconds = {"val/seconds": evaluation.seconds, "val/seconds_scoring": evaluation.seconds_scoring}
        self.record(values | seconds, step)
        categories = self.val_set.categories
        names = [categories.name(label) for label in range(categories.num_classes)]
        panel_range = range(min(self.cfg.wandb.panel_images, len(self.val_set)))
        panel = picture_panel(self.val_set, evaluation.detections, panel_range, PANEL_THRESHOLD)
        rows = [[name, ap] for name, ap in evaluation.per_class.items()]
        self.wandb.log_table("val/AP_table", ["class", "AP"], rows, step)
        self.wandb.log_pictures("val/panel", panel, names, step)
        try:
            save_evaluation(self.folder / "evaluation.json", evaluation, step)
            if panel:
                sheet = grid([draw(picture, names) for picture in panel], [picture.caption for picture in panel])
                sheet.save(self.folder / "panel.png")
        except OSError as error:
            self.progress.say(f"{self.folder}: {error.strerror}; the evaluation is in log.jsonl")
        shown = "  ".join(f"{name} {evaluation.stats[name]:.3f}" for name in ("AP", "AP50", "AP75", "AR100"))
        self.progress.say(f"evaluation at step {step}: {shown}  ({unread}{evaluation.seconds:.1f} s)")


def count_parameters(model: nn.Module) -> dict[str, int]:
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }
