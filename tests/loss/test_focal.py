"""Focal loss and its matching: equal to transformers' and to a slow account, entry by entry in float64."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from detr_fabric.config import LossConfig
from detr_fabric.data.batch import Target
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.loss.focal import focal_cost, focal_loss
from detr_fabric.loss.matcher import pad_targets
from detr_fabric.model.detr import DETROutput
from tests.loss import test_criterion

FOCAL = LossConfig(kind="focal", cost_class=2.0)
CLASSES = test_criterion.CLASSES + 1  # as wide as logits with "no object"


def random_case(counts: list[int], seed: int = 0) -> tuple[DETROutput, list[Target]]:
    return test_criterion.random_case(counts, seed=seed)


def slow_focal(logit: float, yes: bool) -> float:
    """Lin et al. 2017, equation 5."""
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if yes else -0.75 * p**2 * math.log(1 - p)


def test_the_loss_and_the_cost_equal_a_slow_account_of_single_entries() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 2, 5, 3, generator=generator)
    classes = torch.randint(0, 4, (2, 2, 5), generator=generator)  # 3: finds nothing
    found = focal_loss(logits, classes)
    for layer in range(2):
        places = itertools.product(range(2), range(5), range(3))
        slow = sum(slow_focal(logits[layer, b, q, c].item(), bool(classes[layer, b, q] == c)) for b, q, c in places)
        assert found[layer].item() == pytest.approx(slow, rel=1e-5)
    for logit in (-9.0, -1.0, 0.0, 2.0, 9.0):
        expected = slow_focal(logit, True) - slow_focal(logit, False)
        assert focal_cost(torch.tensor(logit)).item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    extreme = torch.tensor([[[[-200.0, 200.0]]]], requires_grad=True)
    focal_loss(extreme, torch.tensor([[[0]]])).backward()
    assert extreme.grad is not None and extreme.grad.isfinite().all()


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0], [2], [7, 7]])
def test_losses_gradients_and_matching_equal_transformers(counts: list[int]) -> None:
    loss = pytest.importorskip("transformers.loss.loss_deformable_detr")
    outputs, targets = random_case(counts)
    criterion = SetCriterion(CLASSES, FOCAL)
    ours = criterion(outputs, targets, num_boxes=max(1, sum(counts)))
    config = SimpleNamespace(
        class_cost=2, bbox_cost=5, giou_cost=2, num_labels=CLASSES, focal_alpha=0.25, auxiliary_loss=True,
        decoder_layers=3, bbox_loss_coefficient=5, giou_loss_coefficient=2,
    )  # fmt: skip
    labels = [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]
    logits, boxes = outputs
    total, parts, _ = loss.DeformableDetrForObjectDetectionLoss(
        logits[-1], labels, logits.device, boxes[-1], config, logits, boxes
    )
    found = ours.losses | {n: v for n, v in ours.metrics.items() if n != "class_error"}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {name: value.item() for name, value in parts.items()}, rel=1e-4, abs=1e-5
    )
    gradients = [torch.autograd.grad(t, outputs, allow_unused=True, retain_graph=True) for t in (ours.total, total)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=1e-4, atol=1e-6)

    matches = criterion.matcher(outputs, pad_targets(targets))
    matcher = loss.DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    for layer in range(3):
        for image, (queries, objects) in enumerate(
            matcher({"logits": logits[layer], "pred_boxes": boxes[layer]}, labels)
        ):
            chosen = (matches.layer == layer) & (matches.image == image)
            assert matches.query[chosen].tolist() == queries.tolist()
            assert matches.target[chosen].tolist() == objects.tolist()


def test_micro_batches_give_the_gradient_of_the_whole_batch_whatever_their_objects() -> None:
    outputs, targets = random_case([3, 0, 5, 1])
    criterion = SetCriterion(CLASSES, FOCAL)
    num_boxes, class_weight_sum = criterion.normalizers(targets, num_queries=7)
    assert num_boxes == class_weight_sum == 9
    whole = torch.autograd.grad(criterion(outputs, targets, num_boxes).total, outputs)
    parts = [
        criterion(DETROutput(*(o[:, part] for o in outputs)), targets[part], num_boxes, class_weight_sum).total
        for part in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    for ours, theirs in zip(torch.autograd.grad(sum(parts), outputs), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_without_objects_every_query_learns_to_say_no() -> None:
    outputs, targets = random_case([0, 0])
    losses = SetCriterion(CLASSES, FOCAL)(outputs, targets, num_boxes=1.0, class_weight_sum=0.0)
    losses.total.backward()
    assert losses.total.isfinite() and losses.losses["loss_bbox"] == 0
    assert outputs.pred_logits.grad is not None and (outputs.pred_logits.grad > 0).all()


def test_metrics_read_logits_without_no_object() -> None:
    _, targets = random_case([2, 1])
    logits = torch.full((1, 2, 7, CLASSES), -5.0)
    outputs = DETROutput(logits, torch.full((1, 2, 7, 4), 0.5))
    matches = SetCriterion(CLASSES, FOCAL).matcher(outputs, pad_targets(targets))
    labels: Tensor = pad_targets(targets).labels[matches.image, matches.target]
    logits[0, matches.image, matches.query, labels] = 0.1  # found, barely: a probability above 0.5
    metrics = SetCriterion(CLASSES, FOCAL)(outputs, targets, num_boxes=3.0).metrics
    assert metrics["class_error"] == 0 and metrics["cardinality_error"] == 0
    metrics = SetCriterion(CLASSES, FOCAL)(DETROutput(logits - 0.2, outputs.pred_boxes), targets, num_boxes=3.0).metrics
    assert metrics["cardinality_error"] == 1.5
