"""Matching and criterion, forward and backward: ours beside transformers' loss and the original's loop over layers.

Shapes: L decoder layers, B images, Q queries, C classes, N objects of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.ops import generalized_box_iou

from detr_fabric.benchmark.measure import Call, PartResult, interleaved, rows
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.data.batch import Target
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.model.detr import DETROutput

LAYERS, QUERIES, CLASSES = 6, 100, 91
OBJECTS = (2, 17, 4, 1, 7, 3, 12, 10)  # of the 8 images; COCO has 7 an image
EOS = 0.1  # weight of the no-object class


def measure(device: torch.device, quick: bool) -> PartResult:
    """Times of one batch's loss and its gradients, after a check that all contenders compute the same."""
    torch.manual_seed(0)
    targets = [_target(count, device) for count in OBJECTS]
    logits = torch.randn(LAYERS, len(OBJECTS), QUERIES, CLASSES + 1, device=device, requires_grad=True)
    boxes = torch.rand(LAYERS, len(OBJECTS), QUERIES, 4, device=device).mul_(0.5).add_(0.25).requires_grad_()
    criterion = SetCriterion(CLASSES).to(device)
    num_boxes = float(sum(OBJECTS))

    losses: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: criterion(DETROutput(logits, boxes), targets, num_boxes).total,
        "loop over layers": lambda: loss_by_layer(logits, boxes, targets, num_boxes),
    }
    missing = []
    try:
        losses["transformers"] = _transformers(logits, boxes, targets)
    except ImportError:
        missing.append("transformers")
    expected = losses["ours"]()
    for name, loss in losses.items():
        assert torch.allclose(loss(), expected, rtol=1e-4), f"{name} computes {loss()}, ours {expected}"

    def call(loss: Callable[[], Tensor]) -> Call:
        return lambda: torch.autograd.grad(loss(), [logits, boxes])

    times = interleaved({name: call(loss) for name, loss in losses.items()}, 0.5 if quick else 15, device)
    return PartResult(rows(f"{LAYERS} layers, batch {len(OBJECTS)}, {sum(OBJECTS)} objects", times), missing)


def _target(count: int, device: torch.device) -> Target:
    centres, sides = 0.3 + 0.4 * torch.rand(count, 2), 0.05 + 0.5 * torch.rand(count, 2)
    labels = torch.randint(CLASSES, (count,))
    return Target(labels.to(device), torch.cat([centres, sides], 1).to(device), 0, (480, 640), (480, 640))


def loss_by_layer(logits: Tensor, boxes: Tensor, targets: list[Target], num_boxes: float) -> Tensor:
    """The original's way: each layer is matched, with a copy of all pairs' costs to the host, and scored on its own."""
    labels = torch.cat([target.labels for target in targets])
    true = torch.cat([target.boxes for target in targets])
    counts = [len(target.labels) for target in targets]
    weights = torch.ones(CLASSES + 1, device=logits.device)
    weights[-1] = EOS
    total = torch.zeros((), device=logits.device)
    for layer_logits, layer_boxes in zip(logits, boxes, strict=True):  # (B, Q, C+1), (B, Q, 4)
        with torch.no_grad():
            probabilities, flat = layer_logits.flatten(0, 1).softmax(-1), layer_boxes.flatten(0, 1)
            overlap = generalized_box_iou(cxcywh_to_xyxy(flat), cxcywh_to_xyxy(true))
            cost = 5 * torch.cdist(flat, true, p=1) - probabilities[:, labels] - 2 * overlap
            table = cost.view(len(targets), QUERIES, -1).cpu()
            pairs = [linear_sum_assignment(costs[i]) for i, costs in enumerate(table.split(counts, -1))]
        image = torch.cat([torch.full((len(query),), i) for i, (query, _) in enumerate(pairs)])
        query = torch.cat([torch.as_tensor(query) for query, _ in pairs])
        classes = torch.full(layer_logits.shape[:2], CLASSES, device=logits.device)
        classes[image, query] = torch.cat([t.labels[o] for t, (_, o) in zip(targets, pairs, strict=True)])
        matched = torch.cat([t.boxes[o] for t, (_, o) in zip(targets, pairs, strict=True)])
        found = layer_boxes[image, query]
        overlap = torch.diag(generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(matched)))
        total = total + cross_entropy(layer_logits.transpose(1, 2), classes, weights)
        total = total + 5 * (found - matched).abs().sum() / num_boxes + 2 * (1 - overlap).sum() / num_boxes
        # for the log, as the original does
        with torch.no_grad():
            detected = (layer_logits.argmax(-1) != CLASSES).sum(1)
            (detected.float() - torch.tensor(counts, device=logits.device).float()).abs().mean()
    return total


def _transformers(logits: Tensor, boxes: Tensor, targets: list[Target]) -> Callable[[], Tensor]:
    """transformers' loss of the same predictions. Raises ImportError where the package is missing."""
    from transformers import DetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    make: Any = DetrConfig  # its signature is built at run time
    config = make(num_labels=CLASSES, auxiliary_loss=True, use_pretrained_backbone=False)
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    return lambda: ForObjectDetectionLoss(
        logits[-1], labels, logits.device, boxes[-1], config, outputs_class=logits, outputs_coord=boxes
    )[0]
