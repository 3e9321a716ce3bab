"""Detections of models with focal loss: the best of all queries and classes, each with its query."""

from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from detr_fabric.data.batch import pad_images
from detr_fabric.evaluate.detect import detect_batch
from detr_fabric.evaluate.topk import top_detections
from detr_fabric.model.detr import DETROutput
from tests.evaluate.test_detect import targets

QUERIES, CLASSES = 6, 4


def predictions(images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, QUERIES, CLASSES, generator=generator)
    return logits, 0.3 + 0.3 * torch.rand(images, QUERIES, 4, generator=generator)


@pytest.mark.parametrize("most", [1, 5, 100])
def test_they_are_the_highest_scores_of_all_pairs_in_order(most: int) -> None:
    logits, boxes = predictions(2)
    sizes = torch.tensor([[40, 80], [30, 60]])
    scores, labels, corners, queries = top_detections(logits, boxes, sizes, most)
    for image in range(2):
        pairs = [(logits[image, q, c].sigmoid().item(), q, c) for q in range(QUERIES) for c in range(CLASSES)]
        expected = sorted(pairs, reverse=True)[:most]
        found = zip(scores[image].tolist(), queries[image].tolist(), labels[image].tolist(), strict=True)
        assert [*found] == [(pytest.approx(score), q, c) for score, q, c in expected]
        height, width = sizes[image].tolist()
        for (_, query, _), corner in zip(expected, corners[image], strict=True):
            x, y, w, h = boxes[image, query].tolist()
            edges = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            assert corner.tolist() == pytest.approx(edges, rel=1e-5)


def test_a_single_class_is_enough() -> None:
    scores, labels, _, queries = top_detections(
        torch.tensor([[[0.0], [2.0]]]), torch.rand(1, 2, 4), torch.ones(1, 2), 5
    )
    torch.testing.assert_close(scores, torch.tensor([[2.0, 0.0]]).sigmoid())
    assert labels.tolist() == [[0, 0]] and queries.tolist() == [[1, 0]]


class Focal(nn.Module):
    focal = True

    def forward(self, images: Tensor, mask: Tensor) -> DETROutput:
        logits, boxes = predictions(len(images))
        return DETROutput(logits[None], boxes[None])


def test_evaluation_takes_them_where_the_model_has_focal_loss_also_when_fabric_wraps_it() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    micro_batch = pad_images([torch.zeros(3, 60, 80, dtype=torch.uint8)] * 3), targets(3)
    for model in (Focal(), fabric.setup_module(Focal())):
        found = detect_batch(fabric, model, micro_batch, topk=5)
        expected = top_detections(*predictions(3), torch.tensor([[30, 40]] * 3), 5)
        for got, wanted in zip(
            (found[2].scores, found[2].labels, found[2].boxes, found[2].queries), expected, strict=True
        ):
            assert got is not None and torch.equal(got, wanted[2])
        assert len(found[1].scores) == 0 and found[1].read_error == "image 1: gone"
