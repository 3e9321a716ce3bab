"""Matching and loss against a slow, per-layer, per-image account of the paper's equations 1 and 2."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detr_fabric.boxes import cxcywh_to_xyxy, generalized_iou, iou_and_union, xyxy_to_cxcywh
from detr_fabric.config import LossConfig
from detr_fabric.data.batch import ImageBatch, Target
from detr_fabric.loss.criterion import SetCriterion, add_losses, forward_backward
from detr_fabric.loss.matcher import HungarianMatcher, pad_targets
from detr_fabric.model.detr import DETROutput

COSTS = (1.0, 5.0, 2.0)
CLASSES = 4


def random_case(counts: list[int], layers: int = 3, queries: int = 7, seed: int = 0) -> tuple[DETROutput, list[Target]]:
    torch.manual_seed(seed)
    logits = torch.randn(layers, len(counts), queries, CLASSES + 1, requires_grad=True)
    boxes = (0.2 + 0.6 * torch.rand(layers, len(counts), queries, 4)).requires_grad_()
    targets = [
        Target(torch.randint(0, CLASSES, (n,)), 0.1 + 0.5 * torch.rand(n, 4), i, (1, 1), (1, 1))
        for i, n in enumerate(counts)
    ]
    return DETROutput(logits, boxes), targets


def slow_cost(logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
    """(Q, N) one entry at a time."""
    cost = torch.zeros(len(logits), len(target.labels))
    for q, n in itertools.product(range(len(logits)), range(len(target.labels))):
        pair = (cxcywh_to_xyxy(boxes[q : q + 1]), cxcywh_to_xyxy(target.boxes[n : n + 1]))
        cost[q, n] = (
            -COSTS[0] * logits[q].softmax(0)[target.labels[n]]
            + COSTS[1] * (boxes[q] - target.boxes[n]).abs().sum()
            - COSTS[2] * torchvision.ops.generalized_box_iou(*pair)[0, 0]
        )
    return cost


def slow_losses(outputs: DETROutput, targets: list[Target], num_boxes: float) -> dict[str, Tensor]:
    """The original's losses, layer after layer, with the best assignment found by trying all of them."""
    losses = {}
    layers = len(outputs.pred_logits)
    weights = torch.ones(CLASSES + 1)
    weights[-1] = 0.1
    for layer, (logits, boxes) in enumerate(zip(*outputs, strict=True)):
        suffix = "" if layer == layers - 1 else f"_{layer}"
        classes = torch.full(logits.shape[:2], CLASSES)
        distance, giou, cardinality = boxes.sum() * 0, boxes.sum() * 0, 0.0
        for image, target in enumerate(targets):
            for query, n in brute_force(slow_cost(logits[image], boxes[image], target).detach()):
                classes[image, query] = target.labels[n]
                pair = (cxcywh_to_xyxy(boxes[image, query])[None], cxcywh_to_xyxy(target.boxes[n])[None])
                distance = distance + (boxes[image, query] - target.boxes[n]).abs().sum()
                giou = giou + 1 - torchvision.ops.generalized_box_iou(*pair)[0, 0]
            found = (logits[image].argmax(-1) != CLASSES).sum()
            cardinality += abs(float(found) - len(target.labels)) / len(targets)
        losses["loss_ce" + suffix] = F.cross_entropy(logits.transpose(1, 2), classes, weights)
        losses["loss_bbox" + suffix] = distance / num_boxes
        losses["loss_giou" + suffix] = giou / num_boxes
        losses["cardinality_error" + suffix] = torch.tensor(cardinality)
    return losses


def brute_force(cost: Tensor) -> list[tuple[int, int]]:
    queries, objects = cost.shape
    if objects <= queries:
        choices = [list(zip(p, range(objects), strict=True)) for p in itertools.permutations(range(queries), objects)]
    else:
        choices = [list(zip(range(queries), p, strict=True)) for p in itertools.permutations(range(objects), queries)]
    return min(choices, key=lambda pairs: sum(float(cost[q, n]) for q, n in pairs))


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_losses_and_gradients_equal_the_slow_account(counts: list[int], seed: int) -> None:
    outputs, targets = random_case(counts, queries=4, seed=seed)
    num_boxes = max(1.0, float(sum(counts)))
    losses = SetCriterion(CLASSES)(outputs, targets, num_boxes)
    slow = slow_losses(outputs, targets, num_boxes)
    found = losses.losses | losses.metrics
    assert {k: v.item() for k, v in found.items() if k != "class_error"} == pytest.approx(
        {k: v.item() for k, v in slow.items()}, rel=1e-4, abs=1e-5
    )
    weight = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    total = sum(w * slow[k] for name, w in weight.items() for k in slow if k.startswith(name))
    for ours, theirs in zip(*(torch.autograd.grad(t, outputs) for t in (losses.total, total)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_more_objects_than_queries_matches_every_query_once() -> None:
    outputs, targets = random_case([6, 2], layers=1, queries=4)
    matches = HungarianMatcher()(outputs, pad_targets(targets))
    assert matches.query[matches.image == 0].tolist() == [0, 1, 2, 3]
    assert len(set(matches.target[matches.image == 0].tolist())) == 4
    assert len(matches.query[matches.image == 1]) == 2


def test_a_batch_without_objects_has_a_zero_box_loss_with_a_gradient() -> None:
    outputs, targets = random_case([0, 0])
    losses = SetCriterion(CLASSES)(outputs, targets, num_boxes=1.0)
    assert losses.losses["loss_bbox"] == 0 and losses.losses["loss_giou"] == 0
    losses.total.backward()
    assert outputs.pred_boxes.grad is not None and not outputs.pred_boxes.grad.any()
    assert outputs.pred_logits.grad.any()


def test_gradients_of_micro_batches_add_up_to_that_of_the_whole_batch() -> None:
    outputs, targets = random_case([3, 0, 5, 1])
    criterion = SetCriterion(CLASSES)
    num_boxes, class_weight_sum = criterion.normalizers(targets, num_queries=7)
    assert num_boxes == 9 and class_weight_sum == pytest.approx(9 + 0.1 * 19)
    whole = torch.autograd.grad(criterion(outputs, targets, num_boxes).total, outputs)
    halves = [
        criterion(DETROutput(*(o[:, part] for o in outputs)), targets[part], num_boxes, class_weight_sum).total
        for part in (slice(0, 2), slice(2, 4))
    ]
    for ours, theirs in zip(torch.autograd.grad(sum(halves), outputs), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_losses_of_micro_batches_add_up_and_metrics_are_averaged_by_image_count() -> None:
    outputs, targets = random_case([4, 0, 5, 1])
    criterion = SetCriterion(CLASSES)
    num_boxes, class_weight_sum = criterion.normalizers(targets, num_queries=7)
    whole = criterion(outputs, targets, num_boxes)
    unequal = (slice(0, 1), slice(1, 4))
    parts = [
        criterion(DETROutput(*(o[:, part] for o in outputs)), targets[part], num_boxes, class_weight_sum)
        for part in unequal
    ]
    added = add_losses(parts, [1, 3])
    assert added.total.item() == pytest.approx(whole.total.item(), rel=1e-5)
    assert added.losses == {name: pytest.approx(value.item(), rel=1e-5) for name, value in whole.losses.items()}
    for layer in ("", "_0", "_1"):
        name = f"cardinality_error{layer}"
        assert added.metrics[name].item() == pytest.approx(whole.metrics[name].item(), rel=1e-5)
    errors = [part.metrics["class_error"].item() for part in parts]
    assert errors[0] != errors[1]
    assert added.metrics["class_error"].item() == pytest.approx(errors[0] / 4 + errors[1] * 3 / 4, rel=1e-5)


def test_images_without_objects_and_without_a_weight_for_no_object_teach_nothing() -> None:
    outputs, targets = random_case([0, 0])
    criterion = SetCriterion(CLASSES, LossConfig(eos_coef=0.0))
    normalizers = torch.tensor(criterion.normalizers(targets, 7))
    batch = ImageBatch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.bool))
    losses = forward_backward(lambda *_: outputs, criterion, (batch, targets), normalizers, Tensor.backward)
    assert losses.total == 0 and not outputs.pred_logits.grad.any() and not outputs.pred_boxes.grad.any()


def test_the_weight_of_a_loss_goes_by_its_name_without_the_layer() -> None:
    criterion = SetCriterion(CLASSES, LossConfig(ce_coef=3.0))
    criterion.weights["loss_l1"] = 2.0  # whose own number is no layer's
    assert [criterion.weight(name) for name in ("loss_ce", "loss_ce_10", "loss_l1", "loss_l1_0")] == [3, 3, 2, 2]


def test_without_auxiliary_losses_only_the_last_layer_is_trained() -> None:
    outputs, targets = random_case([2, 3])
    losses = SetCriterion(CLASSES, LossConfig(aux_loss=False))(outputs, targets, num_boxes=5.0)
    assert set(losses.losses) == {"loss_ce", "loss_bbox", "loss_giou"}
    assert set(losses.metrics) == {"class_error", "cardinality_error"}
    losses.total.backward()
    assert not outputs.pred_logits.grad[:-1].any() and outputs.pred_logits.grad[-1].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_prediction_that_is_not_finite_shows_in_the_loss_and_raises_nothing(value: float) -> None:
    outputs, targets = random_case([2, 1])
    broken = outputs.pred_boxes.detach().clone()
    broken[-1, 0] = value
    losses = SetCriterion(CLASSES)(DETROutput(outputs.pred_logits, broken), targets, num_boxes=3.0)
    assert not losses.total.isfinite()


def test_class_error_is_the_share_of_wrong_names() -> None:
    outputs, targets = random_case([4], layers=1)
    logits = torch.full_like(outputs.pred_logits, -9.0).detach()
    matches = HungarianMatcher()(outputs, pad_targets(targets))
    logits[0, 0, matches.query, targets[0].labels[matches.target]] = 9.0
    right = SetCriterion(CLASSES)(DETROutput(logits, outputs.pred_boxes), targets, num_boxes=4.0)
    assert right.metrics["class_error"] == 0
    wrong = SetCriterion(CLASSES)(DETROutput(-logits, outputs.pred_boxes), targets, num_boxes=4.0)
    assert wrong.metrics["class_error"] == 100


boxes_strategy = st.lists(st.tuples(*[st.floats(0.05, 0.95)] * 4), min_size=1, max_size=5)


@given(a=boxes_strategy, b=boxes_strategy)
def test_overlaps_equal_torchvisions(a: list[tuple[float, ...]], b: list[tuple[float, ...]]) -> None:
    first, second = (cxcywh_to_xyxy(torch.tensor(boxes)) for boxes in (a, b))
    iou, _ = iou_and_union(first[:, None], second[None])
    torch.testing.assert_close(iou, torchvision.ops.box_iou(first, second), rtol=1e-4, atol=1e-6)
    giou = generalized_iou(first[:, None], second[None])
    torch.testing.assert_close(giou, torchvision.ops.generalized_box_iou(first, second), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(xyxy_to_cxcywh(first), torch.tensor(a), rtol=1e-5, atol=1e-6)
