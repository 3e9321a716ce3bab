"""What evaluate.py says about a checkpoint on a data set: scores, mistakes, the worst images, what padding changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torchvision.ops import box_convert

from detr_fabric.config import Config
from detr_fabric.data.batch import Target
from detr_fabric.data.build import build_validation_by_name, validation_file
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.loader import EvalLoader
from detr_fabric.data.sampler import Shard
from detr_fabric.draw import Boxes, Picture, draw, grid
from detr_fabric.evaluate.coco import Detections
from detr_fabric.evaluate.confusion import confusion, table
from detr_fabric.evaluate.detect import Evaluation, evaluate
from detr_fabric.evaluate.diagnosis import THRESHOLD, describe, diagnose
from detr_fabric.evaluate.match import IOU, DetectionMatches, Outcome, match, outcomes
from detr_fabric.evaluate.outputs import picture_panel, save_evaluation
from detr_fabric.model.detr import DETROutput
from detr_fabric.runtime.files import check_outputs, writing
from detr_fabric.runtime.launch import build_fabric
from detr_fabric.runtime.rebuild import Rebuilt
from detr_fabric.terminal import counted, decimal, say

if TYPE_CHECKING:
    from detr_fabric.evaluate.settings import Settings

ELSEWHERE = "set --out to a file elsewhere"


def evaluate_checkpoint(rebuilt: Rebuilt, settings: Settings) -> None:
    """Evaluates the model of a checkpoint, and prints, draws and writes what was asked for."""
    cfg = replace(rebuilt.config, data=settings.data, eval=settings.eval).resolve()
    fabric = build_fabric(settings.accelerator, settings.devices, settings.precision, broadcast_buffers=False)
    fabric.launch()
    beside = Path(settings.out or rebuilt.path).with_name("worst.png")
    if settings.out is not None:
        outputs = [Path(settings.out), beside] if settings.worst else [Path(settings.out)]
        check_outputs(f"--out {settings.out}", outputs, [rebuilt.path, validation_file(cfg.data)])
        with writing(f"--out {settings.out}", ELSEWHERE):
            Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
    categories = rebuilt.categories
    dataset, matched = build_validation_by_name(cfg.data, categories, cfg.train.seed)
    for note in matched.notes if fabric.is_global_zero else ():
        say(note)
    wrapped = fabric.setup_module(rebuilt.model)
    evaluation = _evaluate(fabric, wrapped, dataset, cfg, cfg.eval.batch_size, cfg.data.pad_multiple)
    alone = _evaluate(fabric, wrapped, dataset, cfg, batch_size=1, pad_multiple=1) if settings.padding_check else None
    if evaluation is None:
        return
    step = rebuilt.step
    for error in evaluation.read_errors:
        say(f"skipped {error}")
    unread = f" ({len(evaluation.read_errors)} unreadable ones without detections)" if evaluation.read_errors else ""
    seconds = f"{evaluation.seconds:.1f} s, {evaluation.seconds_scoring:.1f} of them scoring"
    trained = "original checkpoint" if step is None else f"step {step}"
    if rebuilt.config.optim.ema is not None:
        trained += ", moving average" if rebuilt.weights == "ema" else ", raw weights"
    say(f"{len(dataset)} images{unread}, {trained}, in {seconds}")
    more: dict[str, Any] = {"weights": rebuilt.weights}
    if alone is None:
        for name, value in evaluation.stats.items():
            say(f"  {name:6} {decimal(value):>5}")
    else:
        more["padding_check"] = padding_check(alone, evaluation, cfg.eval.batch_size)
    threshold = THRESHOLD if settings.confusion is None else settings.confusion
    matches = match(dataset.annotations, evaluation.detections, matched.labels)
    diagnosis = diagnose(matches, categories, threshold)
    for line in describe(diagnosis, evaluation.stats, evaluation.per_class):
        say(f"  {line}")
    if settings.confusion is not None:
        more["confusion"] = confusion_table(matches, categories, threshold)
    if settings.worst:
        draw_worst(dataset, evaluation.detections, matches, threshold, settings.worst, beside)
    if settings.out is not None:
        with writing(f"--out {settings.out}", ELSEWHERE):
            save_evaluation(Path(settings.out), evaluation, step, diagnosis | more)


def padding_check(alone: Evaluation, together: Evaluation, batch_size: int) -> dict[str, Any]:
    """Prints both, side by side."""
    say(f"         batch 1  batch {batch_size}  difference")
    change = {name: together.stats[name] - value for name, value in alone.stats.items()}
    for name, value in alone.stats.items():
        difference = f"{change[name]:+.4f}" if value >= 0 else "–"
        say(f"  {name:6} {decimal(value, 4):>7}  {decimal(together.stats[name], 4):>7}  {difference}")
    largest = max(change, key=lambda name: abs(change[name]))
    moved = change[largest] != 0
    say(f"  padding changes {largest} most, by {change[largest]:+.4f}" if moved else "  padding changes nothing")
    return {"batch_1": alone.stats, f"batch_{batch_size}": together.stats, "largest_difference": abs(change[largest])}


def confusion_table(matches: DetectionMatches, categories: Categories, threshold: float) -> dict[str, Any]:
    """Prints the table; returns it for JSON."""
    counts = confusion(matches, categories.num_classes, threshold)
    labels = [*categories.labels.values()]  # without coco91's unused ones
    counts = counts[np.ix_([*labels, -1], [*labels, -1])]
    say(f"objects (rows) and what they were found as, score ≥ {threshold:g}, IoU ≥ {IOU:g}:")
    for line in table(counts, categories.names):
        say(f"  {line}")
    names = [*categories.names, "background"]
    return {"threshold": threshold, "iou": IOU, "classes": names, "true_by_found": counts.tolist()}


def draw_worst(
    dataset: CocoDetection,
    detections: Sequence[Detections],
    matches: DetectionMatches,
    threshold: float,
    count: int,
    path: Path,
) -> None:
    """The images with the lowest F1, of equals those with more mistakes, as one picture."""
    images = outcomes(matches, threshold)
    readable = [index for index, found in enumerate(detections) if found.read_error is None]
    ranking = sorted(readable, key=lambda index: (images[index].f1, -images[index].mistakes))[:count]
    categories = dataset.categories
    names = categories.legible_names()
    panel = picture_panel(dataset, detections, ranking, threshold)
    drawn = [
        draw(_name_missed(p, matches, images[index].missed, dataset.load(index)[0].shape[-2:]), names)
        for p, index in zip(panel, ranking, strict=True)
    ]
    captions = [_caption(p.caption, images[index]) for p, index in zip(panel, ranking, strict=True)]
    with writing(f"--worst: {path}", ELSEWHERE):
        grid(drawn, captions, cell=640).save(path)
    shown = f"the {len(ranking)} images of lowest F1 (score ≥ {threshold:g}, IoU ≥ {IOU:g})"
    say(f"{path}: {shown}; solid: found, dashed: true, white: the name of what was missed")


def _name_missed(picture: Picture, matches: DetectionMatches, missed: np.ndarray, size: Sequence[int]) -> Picture:
    """size: height and width of the image's file."""
    boxes = box_convert(torch.from_numpy(matches.there.boxes[missed]), "xywh", "xyxy")
    scale = torch.tensor([picture.image.shape[-1] / size[1], picture.image.shape[-2] / size[0]]).repeat(2)
    return picture._replace(missed=Boxes(boxes * scale, torch.from_numpy(matches.there.labels[missed])))


def _caption(image_id: str, outcome: Outcome) -> str:
    name = image_id if len(image_id) <= 16 else f"…{image_id[-15:]}"
    missed = f"{len(outcome.missed)} of {outcome.objects} missed"
    return f"{name}: F1 {outcome.f1:.2f}, {missed}, {outcome.false} false"


def _evaluate(
    fabric: Fabric, model: nn.Module, dataset: CocoDetection, cfg: Config, batch_size: int, pad_multiple: int
) -> Evaluation | None:
    shard, pin = Shard(fabric.global_rank, fabric.world_size), fabric.device.type == "cuda"
    data = replace(cfg.data, pad_multiple=pad_multiple)
    loader = EvalLoader(dataset, batch_size=batch_size, data=data, shard=shard, pin=pin)
    images, done = -(-len(dataset) // fabric.world_size), 0  # of this rank
    with counted("images", images) as progress:

        def watch(outputs: DETROutput, targets: list[Target]) -> None:
            nonlocal done
            done += len(targets)
            progress(done)

        return evaluate(fabric, model, loader, cfg.eval.backend, watch, cfg.eval.topk)
