"""The report over checkpoints: statistics of a whole data set as JSON, and pictures of what the attention did."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from PIL import Image

from detr_fabric.analysis.capture import mapping_names, mappings
from detr_fabric.analysis.figures import comparison_figure, query_figure
from detr_fabric.analysis.maps import AttentionMaps, attention_maps
from detr_fabric.analysis.plots import overview
from detr_fabric.analysis.records import write_records
from detr_fabric.analysis.statistics import AttentionStatistics, PairRecord, attention_statistics
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.config import Config
from detr_fabric.data.batch import pad_images
from detr_fabric.data.build import build_validation_by_name
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.loader import EvalLoader
from detr_fabric.errors import UserError
from detr_fabric.loss.matcher import HungarianMatcher, pad_targets
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR, DETROutput
from detr_fabric.runtime.files import check_outputs, replace_text, writing
from detr_fabric.runtime.rebuild import Rebuilt
from detr_fabric.terminal import counted, say

if TYPE_CHECKING:
    from detr_fabric.analysis.settings import AnalysisSettings

T = TypeVar("T")


class Subject(NamedTuple):
    """One checkpoint, ready to be looked at."""

    name: str
    file: str
    step: int | None  # None: an original checkpoint, which does not say
    cfg: Config
    model: DETR
    dataset: CocoDetection

    @property
    def matcher(self) -> HungarianMatcher:
        loss = self.cfg.loss
        return HungarianMatcher(loss.cost_class, loss.cost_bbox, loss.cost_giou, loss.focal)


def report(checkpoints: dict[str, Rebuilt], settings: AnalysisSettings) -> None:
    """Analyses the models of checkpoints, given by file name, and writes into settings.out; the work of __main__.py.

    Raises UserError for a device, data, images or queries that aren't there, or a folder that can't be written.
    """
    if settings.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("--accelerator cuda: no CUDA device is visible; use auto or cpu")
    device = torch.device("cuda" if settings.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    names = subject_names({file: str(rebuilt.config.train.name) for file, rebuilt in checkpoints.items()})
    subjects = [subject(names[file], file, rebuilt, settings, device) for file, rebuilt in checkpoints.items()]
    indices = chosen_images(subjects[0].dataset, settings.images, settings.image_ids)
    for each in subjects:
        if max(settings.query_ids, default=0) >= (queries := each.cfg.model.num_queries):
            raise UserError(f"--query-ids {max(settings.query_ids)}: {each.file} has queries 0 to {queries - 1}")
    folder = Path(settings.out)
    check_outputs(f"--out {folder}", [folder / "statistics.json", folder / "overview.png"], checkpoints)
    with writing(f"--out {folder}", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    if settings.random:
        subjects += [untrained(each, device) for each in subjects]
    measured = [(each, measure(each, device)) for each in subjects]
    with writing(f"--out {folder}", "choose another folder"):
        save_statistics(folder / "statistics.json", measured)
        write_records(folder, {each.name: statistics for each, statistics in measured})
        chart = overview([(f"{each.name}, {mapping_names(each.model)}", statistics) for each, statistics in measured])
        chart.savefig(folder / "overview.png")
    with counted("pictures", len(indices)) as progress:
        for done, index in enumerate(indices, 1):
            figures = draw_image(subjects, index, settings.queries, settings.query_ids, device)
            with writing(f"--out {folder}", "choose another folder"):
                for name, figure in figures.items():
                    figure.save(folder / name)
            progress(done)
    say(
        f"written to {folder}: statistics.json, overview.png, tables and records (measures, paibb, images, pairs) "
        f"and the attention in {len(indices)} images"
    )


def subject_names(names: dict[str, str]) -> dict[str, str]:
    """File → the run's own name, or where two have the same, the folder's too, or the file's path."""
    for candidate in (
        names,
        {file: f"{name} ({Path(file).absolute().parent.name})" for file, name in names.items()},
    ):
        if max(Counter(candidate.values()).values()) == 1:
            return candidate
    return {file: file for file in names}


def subject(name: str, file: str, rebuilt: Rebuilt, settings: AnalysisSettings, device: torch.device) -> Subject:
    """The model of a checkpoint and its view of the data: all see the same images, with their own classes."""
    data = replace(settings.data, label_space=rebuilt.config.data.label_space)
    cfg = replace(rebuilt.config, data=data).resolve()
    dataset, matched = build_validation_by_name(cfg.data, rebuilt.categories, cfg.train.seed)
    for note in matched.notes:
        say(f"{name}: {note}")
    return Subject(name, file, rebuilt.step, cfg, rebuilt.model.to(device).eval(), dataset)


def untrained(each: Subject, device: torch.device) -> Subject:
    """The same model before its first step: what training adds to a measure is the difference."""
    torch.manual_seed(each.cfg.train.seed)
    num_classes = each.dataset.categories.num_classes
    model = build_model(each.cfg.model, each.cfg.attn, num_classes, focal=each.cfg.loss.focal)
    return each._replace(name=f"{each.name}, random weights", step=0, model=model.to(device).eval())


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
        data=each.cfg.data,
        pin=device.type == "cuda",
    )
    readable = ((batch, targets) for batch, targets in loader if targets[0].read_error is None)
    with counted(f"images ({each.name})", len(loader)) as progress:
        statistics = attention_statistics(each.model, _telling(readable, progress), each.matcher)
    statistics = statistics._replace(pair_records=with_areas(statistics.pair_records, each.dataset))
    unread = len(each.dataset) - statistics.images
    images = f"{statistics.images} images" + (f" ({unread} more could not be read)" if unread else "")
    trained = "original checkpoint" if each.step is None else f"step {each.step}"
    say(f"{each.name}: {images}, {trained}, in {time.perf_counter() - started:.1f} s")
    return statistics


def with_areas(pairs: Sequence[PairRecord], dataset: CocoDetection) -> list[PairRecord]:
    """The pairs with their objects' areas as annotated: COCO's sizes go by the area of the mask, not of the box."""
    known = dataset.annotations
    rows = {image_id: known.objects(index) for index, image_id in enumerate(dataset.image_ids)}
    areas = {image_id: known.areas[objects][~known.crowd[objects]] for image_id, objects in rows.items()}
    return [pair._replace(area=float(areas[pair.image_id][pair.object])) for pair in pairs]


def _telling(batches: Iterable[T], progress: Callable[[int], None]) -> Iterator[T]:
    """The same batches; how many have come is told."""
    for done, batch in enumerate(batches, 1):
        yield batch
        progress(done)


def save_statistics(path: Path, measured: Sequence[tuple[Subject, AttentionStatistics]]) -> None:
    """Writes all numbers as JSON, replacing an earlier file whole."""
    models = [
        {
            "name": each.name,
            "checkpoint": each.file,
            "step": each.step,
            "mapping": mappings(each.model),
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
    """The figures of one image by file name: one for each model and, for several, one that compares them."""
    models = [image_maps(each, index, device) for each in subjects]
    image_id = str(subjects[0].dataset.image_ids[index])
    title, stem = f"image {image_id}", f"image{file_name(image_id)}"
    figures = {}
    for maps in models:
        queries = list(query_ids) or maps.scores.argsort(descending=True)[:count].tolist()
        figures[f"{stem}_{file_name(maps.model)}.png"] = query_figure(maps, queries, title)
    if len(models) > 1:
        first = models[0]
        by_score = sorted(first.matched, key=lambda number: -float(first.scores[first.matched[number]]))
        figures[f"{stem}.png"] = comparison_figure(models, by_score[:count], title)
    return figures


def file_name(name: str) -> str:
    """A name without anything that a file's name must not have."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_")


def image_maps(each: Subject, index: int, device: torch.device) -> AttentionMaps:
    """The attention of a model in one image of the data set, with the ground truth."""
    image, target = each.dataset[(0, index)]
    batch, target_there = move_data_to_device((pad_images([image]), target), device)
    categories = each.dataset.categories
    names = categories.legible_names()
    maps, output = attention_maps(each.model, each.name, image, batch, names)
    matches = each.matcher(DETROutput(*(o[-1:] for o in output)), pad_targets([target_there]))
    matched = dict(zip(matches.target.tolist(), matches.query.tolist(), strict=True))
    return maps._replace(gt_labels=target.labels, gt_boxes=cxcywh_to_xyxy(target.boxes), matched=matched)
