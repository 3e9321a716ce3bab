"""Detecting and gathering: what is kept of a batch, and who hears of it."""

from __future__ import annotations

import pickle

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from detr_fabric.data.batch import Target, pad_images
from detr_fabric.evaluate.detect import detect_batch
from detr_fabric.model.detr import DETROutput

QUERIES, CLASSES = 100, 80


class Constant(nn.Module):
    """The same boxes for every image: left half, and so on."""

    def forward(self, images: Tensor, mask: Tensor) -> DETROutput:
        generator = torch.Generator().manual_seed(0)
        shape = (1, len(images), QUERIES)
        logits = torch.randn(*shape, CLASSES + 1, generator=generator)
        return DETROutput(logits, torch.tensor([0.25, 0.5, 0.5, 1.0]).expand(*shape, 4))


def targets(count: int) -> list[Target]:
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    faults = [None, "image 1: gone"] + [None] * count
    return [Target(*nothing, k, (30, 40), (60, 80), faults[k]) for k in range(count)]


def test_what_is_kept_of_an_image_does_not_take_its_batch_along() -> None:
    """Gathering pickles it: of a view the storage of the whole batch would be sent, for every image of it."""
    micro_batch = pad_images([torch.zeros(3, 60, 80, dtype=torch.uint8)] * 8), targets(8)
    found = detect_batch(Fabric(accelerator="cpu", devices=1), Constant(), micro_batch)
    sizes = [len(pickle.dumps(one)) for one in found]
    assert QUERIES * (4 + 8 + 16) < sizes[0] < 4500 and sizes[1] < 2000
    assert found[0].boxes.tolist() == [[0.0, 0.0, 20.0, 30.0]] * QUERIES
    assert found[1].read_error == "image 1: gone" and len(found[1].scores) == len(found[1].boxes) == 0


def test_a_watcher_gets_outputs_and_targets_of_every_batch_and_may_end_it() -> None:
    class Enough(Exception):
        pass

    seen: list[tuple[int, int]] = []

    def watch(outputs: DETROutput, targets: list[Target]) -> None:
        seen.append((outputs.pred_boxes.shape[1], len(targets)))
        if len(seen) == 2:
            raise Enough

    fabric = Fabric(accelerator="cpu", devices=1)
    micro_batch = pad_images([torch.zeros(3, 60, 80, dtype=torch.uint8)] * 3), targets(3)
    assert len(detect_batch(fabric, Constant(), micro_batch, watch)) == 3
    with pytest.raises(Enough):
        detect_batch(fabric, Constant(), micro_batch, watch)
    assert seen == [(3, 3), (3, 3)]
