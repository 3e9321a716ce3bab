"""Checkpoints → the data of the attention explorer, the worst images and the confusion of classes."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device
from PIL import Image
from torch import Tensor

from detr_fabric.analysis.capture import mapping_names
from detr_fabric.analysis.maps import attention
from detr_fabric.analysis.report import Subject, chosen_images, subject
from detr_fabric.analysis.settings import AnalysisSettings
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.config import DataConfig
from detr_fabric.data.batch import pad_images
from detr_fabric.errors import UserError
from detr_fabric.evaluate.settings import data_defaults
from detr_fabric.model.detr import post_process
from detr_fabric.model.parameters import count_parameters
from detr_fabric.report.maps import image_attention, image_of_run
from detr_fabric.report.runs import RunFiles
from detr_fabric.report.scan import Scanned, how_it_went, mistakes, scan, spread, table, worst
from detr_fabric.report.settings import Settings
from detr_fabric.runtime.launch import single_device
from detr_fabric.runtime.rebuild import rebuild
from detr_fabric.terminal import say

SIDE = 640  # longest side of a photo in the page, in pixels


def explore(runs: Sequence[RunFiles], settings: Settings) -> dict[str, Any]:
    """{explorer, mistakes, rows, configs} of the runs that have a checkpoint, or nothing where none has. The last two:
    by number of the run, what the checkpoint says of it, for the table, and its settings.

    Raises UserError for a checkpoint, a device or data that can't be used.
    """
    numbered = [(number, run) for number, run in enumerate(runs) if run.checkpoint is not None]
    if not numbered:
        return {}
    fabric = single_device(settings.accelerator, "32-true")
    subjects = load(numbered, settings, fabric.device)
    dataset = subjects[0].dataset
    scanned = []
    for each in subjects:
        started, looked_at = time.perf_counter(), spread(len(dataset), settings.scan)
        scanned.append(scan(each, fabric, looked_at, settings.threshold))
        say(f"{each.name}: {len(looked_at)} validation images in {time.perf_counter() - started:.1f} s")
    indices = chosen_images(dataset, settings.images, settings.image_ids)
    worse = worst(scanned, settings.worst)
    indices += [index for index in worse if index not in indices]
    images = [picture(subjects[0], index) for index in indices]
    left = settings.megabytes * 2**20 - sum(len(image["photo"]) for image in images)
    budget = left / max(1, len(indices) * len(subjects))  # characters
    shown, rows = [], {}
    for (number, _), each, run in zip(numbered, subjects, scanned, strict=True):
        rows[number] = {
            "mapping": mapping_names(each.model),
            "backbone": each.cfg.model.backbone,
            "steps": each.step,
            "parameters": count_parameters(each.model)["total"],
        }
        shown.append(
            {
                "run": number,
                "mapping": mapping_names(each.model),
                "step": each.step,
                "layers": {"cross": each.cfg.model.dec_layers, "encoder": each.cfg.model.enc_layers},
                "heads": each.cfg.model.heads,
                "confusion": table(run),
                "images": [seen(each, index, run, settings.queries, budget, fabric.device) for index in indices],
            }
        )
    explorer = {
        "threshold": settings.threshold,
        "worst": [indices.index(index) for index in worse],
        "scanned": len(scanned[0].outcomes),
        "validation": len(dataset),
        "images": images,
        "runs": shown,
    }
    configs = {number: each.cfg.to_dict() for (number, _), each in zip(numbered, subjects, strict=True)}
    return {"explorer": explorer, "mistakes": mistakes(scanned), "rows": rows, "configs": configs}


def load(numbered: Sequence[tuple[int, RunFiles]], settings: Settings, device: torch.device) -> list[Subject]:
    """The models, all with the first one's data and their own classes."""
    rebuilt = [rebuild(run.checkpoint, settings.dc5) for _, run in numbered if run.checkpoint is not None]
    data = rebuilt[0].config.data
    if settings.data_root is not None:
        data = replace(data_defaults(data, DataConfig(root=settings.data_root)), root=settings.data_root)
    try:
        named = zip(numbered, rebuilt, strict=True)
        return [
            subject(run.name, str(run.checkpoint), each, AnalysisSettings((), data), device) for (_, run), each in named
        ]
    except UserError as error:
        raise UserError(f"{error}; or name the data with --data-root, or leave attention out: --images 0") from error


def picture(each: Subject, index: int) -> dict[str, Any]:
    """A photo as the model sees it, small, with its objects."""
    image, target = each.dataset[(0, index)]
    return {
        "id": str(each.dataset.image_ids[index]),
        "size": [image.shape[2], image.shape[1]],
        "photo": photo(image),
        "objects": [
            {"name": each.dataset.categories.name(label), "box": [round(side, 5) for side in box]}
            for label, box in zip(target.labels.tolist(), cxcywh_to_xyxy(target.boxes).tolist(), strict=True)
        ],
    }


def photo(image: Tensor) -> str:
    """(3, H, W) uint8 as a data URL: a JPEG, or for small drawings a PNG, which keeps their edges."""
    drawn, file = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    drawn.thumbnail((SIDE, SIDE))
    kind = "png" if max(drawn.size) <= 128 else "jpeg"
    drawn.save(file, kind, optimize=True, quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def seen(
    each: Subject, index: int, scanned: Scanned, queries: int, budget: float, device: torch.device
) -> dict[str, Any]:
    """What a run did with one image."""
    image, _ = each.dataset[(0, index)]
    batch = move_data_to_device(pad_images([image]), device)
    attended, (logits, boxes) = attention(each.model, batch, ("decoder_cross", "encoder_self"))
    unit = torch.ones(1, 2, device=device)
    scores, labels, corners = (x[0].cpu() for x in post_process(logits[-1], boxes[-1], unit, each.model.focal))
    names = [each.dataset.categories.name(label) for label in labels.tolist()]
    made = image_of_run(image_attention(attended), scores, corners, names, queries, budget)
    return made | {"went": how_it_went(scanned.outcomes.get(index))}
