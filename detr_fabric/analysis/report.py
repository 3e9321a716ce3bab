"""The report over checkpoints: statistics of a whole data set as JSON, and pictures of what the attention did."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from PIL import Image
from rich.progress import track

from detr_fabric.analysis.capture import attention_blocks, capture
from detr_fabric.analysis.measures import crop_padding
from detr_fabric.analysis.plots import overview
from detr_fabric.analysis.sheets import Look, comparison_sheet, query_sheet
from detr_fabric.analysis.statistics import AttentionStatistics, attention_statistics
from detr_fabric.batch import normalize, pad_images
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.checkpoint import load_model_state
from detr_fabric.config import Config
from detr_fabric.data.coco import Categories, CocoDetection
from detr_fabric.data.loader import EvalLoader, build_validation
from detr_fabric.errors import UserError
from detr_fabric.loss.matcher import match, pad_targets
from detr_fabric.model.detr import DETR, DETROutput, build_model, post_process
from detr_fabric.output import replace_text, writing

if TYPE_CHECKING:
    from detr_fabric.analysis.__main__ import Settings


class Subject(NamedTuple):
    """One checkpoint, ready to be looked at."""

    name: str
    file: str
    step: int
    cfg: Config
    model: DETR
    dataset: CocoDetection

    @property
    def costs(self) -> tuple[float, float, float]:
        loss = self.cfg.loss
        return loss.cost_class, loss.cost_bbox, loss.cost_giou

    @property
    def mappings(self) -> dict[str, str]:
        """The mapping of each site that has a layer."""
        return {site: blocks[0].mapping for site, blocks in attention_blocks(self.model).items() if blocks}

    @property
    def mapping(self) -> str:
        """The mappings in short, as pictures show them."""
        return " / ".join(dict.fromkeys(self.mappings.values()))


def report(contents: dict[str, dict[str, Any]], settings: Settings) -> None:
    """Analyses loaded checkpoints, given by file name, and writes into settings.out; the work of __main__.py.

    Raises UserError for a device, data, images or queries that aren't there, or a folder that can't be written.
    """
    if settings.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("--accelerator cuda: no CUDA device is visible; use auto or cpu")
    device = torch.device("cuda" if settings.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    names = subject_names({file: content["config"]["train"]["name"] for file, content in contents.items()})
    subjects = [subject(names[file], file, content, settings, device) for file, content in contents.items()]
    indices = chosen_images(subjects[0].dataset, settings.images, settings.image_ids)
    for each in subjects:
        if max(settings.query_ids, default=0) >= (queries := each.cfg.model.num_queries):
            raise UserError(f"--query-ids {max(settings.query_ids)}: {each.file} has queries 0 to {queries - 1}")
    folder = Path(settings.out)
    with writing(f"--out {folder}", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    measured = [(each, measure(each, device)) for each in subjects]
    with writing(f"--out {folder}", "choose another folder"):
        save_statistics(folder / "statistics.json", measured)
        figure = overview([(f"{each.name}, {each.mapping}", statistics) for each, statistics in measured])
        figure.save(folder / "overview.png")
    for index in indices:
        sheets = draw_image(subjects, index, settings.queries, settings.query_ids, device)
        with writing(f"--out {folder}", "choose another folder"):
            for name, sheet in sheets.items():
                sheet.save(folder / name)
    print(f"written to {folder}: statistics.json, overview.png and the attention in {len(indices)} images")


def subject_names(names: dict[str, str]) -> dict[str, str]:
    """File → the run's own name, or where two have the same, the folder's too, or the file's path."""
    for candidate in (
        names,
        {file: f"{name} ({Path(file).absolute().parent.name})" for file, name in names.items()},
    ):
        if max(Counter(candidate.values()).values()) == 1:
            return candidate
    return {file: file for file in names}


def subject(name: str, file: str, content: dict[str, Any], settings: Settings, device: torch.device) -> Subject:
    """Rebuilds the model of a checkpoint and its view of the data: all see the same images, with their own classes."""
    stored = Config.from_dict(content["config"])
    data = replace(settings.data, label_space=stored.data.label_space)
    cfg = replace(stored, data=data).resolve()
    categories = Categories.from_dict(content["categories"])
    dataset = build_validation(cfg.data, categories, cfg.train.seed)
    model = build_model(cfg.model, cfg.attn, categories.num_classes, pretrained=False)
    load_model_state(model, content["model"], file)
    return Subject(name, file, content["state"]["step"], cfg, model.to(device).eval(), dataset)


def chosen_images(dataset: CocoDetection, count: int, image_ids: Sequence[str]) -> list[int]:
    """Indices of the named images, else of `count` images with objects, spread evenly over the data set."""
    if image_ids:
        known = {str(image_id): index for index, image_id in enumerate(dataset.image_ids)}
        unknown = [image_id for image_id in image_ids if image_id not in known]
        if unknown:
            raise UserError(f"--image-ids {unknown[0]}: the data has no such image; its first id is {min(known)}")
        return [known[image_id] for image_id in image_ids]
    candidates = np.flatnonzero(np.diff(dataset.annotations.offsets)).tolist()
    count = min(count, len(candidates))
    return [candidates[number * len(candidates) // count] for number in range(count)]


def measure(each: Subject, device: torch.device) -> AttentionStatistics:
    """The statistics over all validation images."""
    started = time.perf_counter()
    loader = EvalLoader(
        each.dataset,
        batch_size=1,  # padding beside an image would change its features, and a batch the memory that is needed
        rank=0,
        world=1,
        workers=each.cfg.data.workers,
        pad_multiple=each.cfg.data.pad_multiple,
        pin_memory=device.type == "cuda",
    )
    readable = ((batch, targets) for batch, targets in loader if targets[0].fault is None)
    batches = track(readable, each.name, len(loader), transient=True, disable=not sys.stdout.isatty())
    statistics = attention_statistics(each.model, batches, each.costs)
    unread = len(each.dataset) - statistics.images
    images = f"{statistics.images} images" + (f" ({unread} more could not be read)" if unread else "")
    print(f"{each.name}: {images}, step {each.step}, in {time.perf_counter() - started:.1f} s")
    return statistics


def save_statistics(path: Path, measured: Sequence[tuple[Subject, AttentionStatistics]]) -> None:
    """Writes all numbers as JSON, replacing an earlier file whole."""
    models = [
        {
            "name": each.name,
            "checkpoint": each.file,
            "step": each.step,
            "mapping": each.mappings,
            "images": statistics.images,
            "pairs": statistics.pairs,
            "curves": statistics.curves(),
            "heads": [head._asdict() for head in statistics.heads],
        }
        for each, statistics in measured
    ]
    replace_text(path, json.dumps({"models": models}, indent=1) + "\n")


def draw_image(
    subjects: Sequence[Subject], index: int, count: int, query_ids: Sequence[int], device: torch.device
) -> dict[str, Image.Image]:
    """The sheets of one image by file name: one for each model and, for several, one that compares them."""
    looks = [look(each, index, device) for each in subjects]
    image_id = str(subjects[0].dataset.image_ids[index])
    title, stem = f"image {image_id}", f"image{file_name(image_id)}"
    sheets = {}
    for seen in looks:
        queries = list(query_ids) or seen.scores.argsort(descending=True)[:count].tolist()
        sheets[f"{stem}_{file_name(seen.model)}.png"] = query_sheet(seen, queries, title)
    if len(looks) > 1:
        first = looks[0]
        surest = sorted(first.matched, key=lambda number: -float(first.scores[first.matched[number]]))
        sheets[f"{stem}.png"] = comparison_sheet(looks, surest[:count], title)
    return sheets


def file_name(name: str) -> str:
    """A name without anything that a file's name must not have."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_")


@torch.no_grad()
def look(each: Subject, index: int, device: torch.device) -> Look:
    """Runs a model on one image and keeps what a sheet shows."""
    image, target = each.dataset[(0, index)]
    batch, target_there = move_data_to_device((pad_images([image]), target), device)
    with capture(each.model) as seen:
        logits, boxes = each.model(*normalize(batch))
    last = DETROutput(logits[-1:], boxes[-1:])
    matches = match(last, pad_targets([target_there]), *each.costs)
    scores, labels, _ = post_process(logits[-1], boxes[-1], torch.tensor([target.size], device=device))
    assert seen.mask is not None
    h, w = seen.mask.shape[-2:]
    layers = [seen.weights["decoder_cross"][layer] for layer in sorted(seen.weights["decoder_cross"])]
    cross = torch.stack([crop_padding(weights, seen.mask, queries_too=False)[0] for weights in layers])
    categories = each.dataset.categories
    return Look(
        model=each.name,
        mapping=each.mapping,
        image=image,
        scores=scores[0].cpu(),
        labels=labels[0].cpu(),
        boxes=cxcywh_to_xyxy(boxes[-1, 0]).cpu(),
        cross=cross.unflatten(-1, (h, w)).cpu(),
        true_labels=target.labels,
        true_boxes=cxcywh_to_xyxy(target.boxes),
        matched=dict(zip(matches.target.tolist(), matches.query.tolist(), strict=True)),
        class_names=[categories.name(label) for label in range(categories.num_classes)],
    )
