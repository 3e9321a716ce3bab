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

from detr_fabric.checkpoint import load_model_state
from detr_fabric.config import Config
from detr_fabric.data.categories import Categories
from detr_fabric.data.coco import CocoDetection
from detr_fabric.data.loader import EvalLoader, build_foreign_validation
from detr_fabric.evaluation import Evaluation, evaluate, picture_panel, save_evaluation
from detr_fabric.launch import build_fabric
from detr_fabric.mistakes import IOU, Objects, Pairs, confusion, describe, pair
from detr_fabric.model.detr import build_model
from detr_fabric.output import writing
from detr_fabric.pictures import Boxes, Picture, draw, grid
from detr_fabric.scoring import Detections

if TYPE_CHECKING:
    from detr_fabric.evaluate import Settings

ELSEWHERE = "set --out to a file elsewhere"
THRESHOLD = 0.5  # score of the detections by which images are ranked, unless --confusion names another


def evaluate_checkpoint(content: dict[str, Any], path: Path, settings: Settings) -> None:
    """Rebuilds the model of a loaded checkpoint, evaluates it, and prints, draws and writes what was asked for."""
    cfg = replace(Config.from_dict(content["config"]), data=settings.data, eval=settings.eval).resolve()
    fabric = build_fabric(settings.accelerator, settings.devices, settings.precision, broadcast_buffers=False)
    fabric.launch()
    if settings.out is not None:
        with writing(f"--out {settings.out}", ELSEWHERE):
            Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
    categories = Categories.from_dict(content["categories"])
    dataset, matched = build_foreign_validation(cfg.data, categories, cfg.train.seed)
    for note in matched.notes if fabric.is_global_zero else ():
        print(note)
    model = build_model(cfg.model, cfg.attn, categories.num_classes, pretrained=False)
    load_model_state(model, content["model"], "checkpoint")
    wrapped = fabric.setup_module(model)
    evaluation = _evaluate(fabric, wrapped, dataset, cfg, cfg.eval.batch_size, cfg.data.pad_multiple)
    alone = _evaluate(fabric, wrapped, dataset, cfg, batch_size=1, pad_multiple=1) if settings.padding_check else None
    if evaluation is None:
        return
    step = content["state"]["step"]
    for fault in evaluation.faults:
        print(f"skipped {fault}")
    unread = f" ({len(evaluation.faults)} unreadable ones without detections)" if evaluation.faults else ""
    seconds = f"{evaluation.seconds:.1f} s, {evaluation.seconds_scoring:.1f} of them scoring"
    print(f"{len(dataset)} images{unread}, step {step}, in {seconds}")
    more: dict[str, Any] = {}
    if alone is None:
        for name, value in evaluation.stats.items():
            print(f"  {name:6} {value:.3f}")
    else:
        more["padding_check"] = padding_check(alone, evaluation, cfg.eval.batch_size)
    for name, value in evaluation.per_class.items():
        print(f"  AP of {name:20} {value:.3f}")
    if settings.confusion is not None:
        images = pairs(dataset, evaluation.detections, matched.labels, settings.confusion)
        more["confusion"] = confusion_table(images, categories, settings.confusion)
    if settings.worst:
        threshold = THRESHOLD if settings.confusion is None else settings.confusion
        images = pairs(dataset, evaluation.detections, matched.labels, threshold)
        draw_worst(dataset, evaluation.detections, images, threshold, settings.worst, _beside(settings.out or path))
    if settings.out is not None:
        with writing(f"--out {settings.out}", ELSEWHERE):
            save_evaluation(Path(settings.out), evaluation, step, more)


def padding_check(alone: Evaluation, together: Evaluation, batch_size: int) -> dict[str, Any]:
    """Prints both, side by side."""
    print(f"         batch 1  batch {batch_size}  difference")
    change = {name: together.stats[name] - value for name, value in alone.stats.items()}
    for name, value in alone.stats.items():
        print(f"  {name:6} {value:7.4f}  {together.stats[name]:7.4f}  {change[name]:+.4f}")
    largest = max(change, key=lambda name: abs(change[name]))
    moved = change[largest] != 0
    print(f"  padding changes {largest} most, by {change[largest]:+.4f}" if moved else "  padding changes nothing")
    return {"batch_1": alone.stats, f"batch_{batch_size}": together.stats, "largest_difference": abs(change[largest])}


def pairs(
    dataset: CocoDetection, detections: Sequence[Detections], labels: frozenset[int], threshold: float
) -> list[Pairs]:
    """The mistakes of each image, in the data set's order. Detections of classes that the data has no annotations for,
    not among `labels`, are neither right nor wrong: they don't count."""
    known = dataset.annotations
    images = []
    for index, found in enumerate(detections):
        objects = known.objects(index)
        boxes = known.boxes[objects]
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)  # xyxy
        counts = torch.tensor([label in labels for label in found.labels.tolist()], dtype=torch.bool)
        there = Objects(corners, known.labels[objects], known.crowd[objects])
        kept = (found.boxes[counts].double().numpy(), found.labels[counts].numpy(), found.scores[counts].numpy())
        images.append(pair(there, *kept, threshold))
    return images


def confusion_table(images: Sequence[Pairs], categories: Categories, threshold: float) -> dict[str, Any]:
    """Prints the table; returns it for JSON."""
    counts = confusion(images, categories.num_classes)
    labels = [*categories.labels.values()]  # without coco91's unused ones
    counts = counts[np.ix_([*labels, -1], [*labels, -1])]
    print(f"objects (rows) and what they were found as, score ≥ {threshold:g}, IoU ≥ {IOU:g}:")
    for line in describe(counts, categories.names):
        print(f"  {line}")
    names = [*categories.names, "background"]
    return {"threshold": threshold, "iou": IOU, "classes": names, "true_by_found": counts.tolist()}


def draw_worst(
    dataset: CocoDetection,
    detections: Sequence[Detections],
    images: Sequence[Pairs],
    threshold: float,
    count: int,
    path: Path,
) -> None:
    """The images with the lowest F1, of equals those with more mistakes, as one picture."""
    readable = [index for index, found in enumerate(detections) if found.fault is None]
    ranking = sorted(readable, key=lambda index: (images[index].f1, -images[index].mistakes))[:count]
    categories = dataset.categories
    names = [categories.name(label) for label in range(categories.num_classes)]
    panel = picture_panel(dataset, detections, ranking, threshold)
    drawn = [
        draw(_name_missed(p, images[index], dataset, index), names) for p, index in zip(panel, ranking, strict=True)
    ]
    captions = [_caption(p.caption, images[index]) for p, index in zip(panel, ranking, strict=True)]
    with writing(f"--worst: {path}", ELSEWHERE):
        grid(drawn, captions, cell=640).save(path)
    shown = f"the {len(ranking)} images of lowest F1 (score ≥ {threshold:g}, IoU ≥ {IOU:g})"
    print(f"{path}: {shown}; solid: found, dashed: true, white: the name of what was missed")


def _name_missed(picture: Picture, mistakes: Pairs, dataset: CocoDetection, index: int) -> Picture:
    height, width = dataset.load(index)[0].shape[-2:]
    scale = np.array([picture.image.shape[-1] / width, picture.image.shape[-2] / height] * 2)
    boxes, labels = mistakes.places[mistakes.missed] * scale, mistakes.true[mistakes.missed]
    return picture._replace(missed=Boxes(torch.from_numpy(boxes), torch.from_numpy(labels)))


def _caption(image_id: str, mistakes: Pairs) -> str:
    name = image_id if len(image_id) <= 16 else f"…{image_id[-15:]}"
    false = int((~mistakes.right).sum())
    return f"{name}: F1 {mistakes.f1:.2f}, {len(mistakes.missed)} of {len(mistakes.true)} missed, {false} false"


def _beside(file: str | Path) -> Path:
    return Path(file).parent / "worst.png"


def _evaluate(
    fabric: Fabric, model: nn.Module, dataset: CocoDetection, cfg: Config, batch_size: int, pad_multiple: int
) -> Evaluation | None:
    loader = EvalLoader(
        dataset,
        batch_size,
        fabric.global_rank,
        fabric.world_size,
        cfg.data.workers,
        pad_multiple,
        pin_memory=fabric.device.type == "cuda",
    )
    return evaluate(fabric, model, loader, dataset, cfg.eval.backend)
