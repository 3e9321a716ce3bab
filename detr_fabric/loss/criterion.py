"""The set loss: classification, L1 and generalised IoU over the matched pairs (Carion et al. 2020, equation 2).

Shapes: L decoder layers, B batch, Q queries, C classes, P matched pairs of one layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fabric.batch import Target
from detr_fabric.boxes import cxcywh_to_xyxy, generalized_iou
from detr_fabric.loss.matcher import Matches, PaddedTargets, match, pad_targets
from detr_fabric.model.detr import DETROutput


class Losses(NamedTuple):
    """What one forward pass costs."""

    total: Tensor  # () weighted sum over all layers: what is minimised
    parts: dict[str, Tensor]  # unweighted scalars under the original's names, auxiliary layers as loss_ce_0 …


class SetCriterion(nn.Module):
    """Matches every layer's queries to the objects, then scores classes and boxes of all layers at once."""

    class_weights: Tensor  # (C+1,)

    def __init__(
        self,
        num_classes: int,
        cost_class: float = 1.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        ce_coef: float = 1.0,
        bbox_coef: float = 5.0,
        giou_coef: float = 2.0,
        eos_coef: float = 0.1,
        aux_loss: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.costs = (cost_class, cost_bbox, cost_giou)
        self.weights = {"loss_ce": ce_coef, "loss_bbox": bbox_coef, "loss_giou": giou_coef}
        self.eos_coef = eos_coef
        self.aux_loss = aux_loss
        class_weights = torch.ones(num_classes + 1)
        class_weights[-1] = eos_coef
        self.register_buffer("class_weights", class_weights)

    def normalizers(self, targets: list[Target], num_queries: int) -> tuple[float, float]:
        """(objects, summed class weights) of these images: what box and class losses are divided by.

        Both follow from the object counts alone, for every image gets min(objects, queries) pairs. So they can be
        added over micro-batches and averaged over ranks before the first forward pass.
        """
        pairs = sum(min(len(t.labels), num_queries) for t in targets)
        no_objects = num_queries * len(targets) - pairs
        return float(sum(len(t.labels) for t in targets)), pairs + self.eos_coef * no_objects

    def forward(
        self,
        outputs: DETROutput,
        targets: list[Target],
        num_boxes: float | Tensor,
        class_weight_sum: float | Tensor | None = None,
    ) -> Losses:
        """Losses of a batch, float32.

        num_boxes: objects that box losses are divided by, at least 1: of the effective batch, averaged over ranks.
        class_weight_sum: the same for the classification loss; None: of this batch, as the original does on each rank.
        """
        if not self.aux_loss:
            outputs = DETROutput(outputs.pred_logits[-1:], outputs.pred_boxes[-1:])
        objects = pad_targets(targets)
        matches = match(outputs, objects, *self.costs)
        if class_weight_sum is None:
            class_weight_sum = self.normalizers(targets, outputs.pred_logits.shape[2])[1]
        losses = {
            "loss_ce": self.loss_labels(outputs, objects, matches) / class_weight_sum,
            **{name: value / num_boxes for name, value in self.loss_boxes(outputs, objects, matches).items()},
        }  # each (L,)
        total = torch.stack([self.weights[name] * value.sum() for name, value in losses.items()]).sum()
        losses["cardinality_error"] = self.cardinality_error(outputs, objects)
        parts = {"class_error": self.class_error(outputs, objects, matches)}
        for name, value in losses.items():
            *aux, last = value.detach().unbind()
            parts[name] = last
            parts |= {f"{name}_{layer}": loss for layer, loss in enumerate(aux)}
        return Losses(total, parts)

    def loss_labels(self, outputs: DETROutput, objects: PaddedTargets, matches: Matches) -> Tensor:
        """Weighted cross-entropy summed over images and queries, (L,); unmatched queries should say "no object"."""
        logits = outputs.pred_logits.float()  # (L, B, Q, C+1)
        classes = torch.full(logits.shape[:3], self.num_classes, device=logits.device)
        classes[matches.layer, matches.image, matches.query] = objects.labels[matches.image, matches.target]
        loss = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), self.class_weights, reduction="none")
        return loss.view(len(logits), -1).sum(1)

    def loss_boxes(self, outputs: DETROutput, objects: PaddedTargets, matches: Matches) -> dict[str, Tensor]:
        """L1 and generalised IoU losses summed over the matched pairs, each (L,); without objects 0 with a gradient."""
        boxes = outputs.pred_boxes.float()
        predicted = boxes[matches.layer, matches.image, matches.query].view(len(boxes), -1, 4)  # (L, P, 4)
        true = objects.boxes[matches.image, matches.target].view(len(boxes), -1, 4)
        giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(true))
        return {"loss_bbox": (predicted - true).abs().sum((1, 2)), "loss_giou": (1 - giou).sum(1)}

    @torch.no_grad()
    def cardinality_error(self, outputs: DETROutput, objects: PaddedTargets) -> Tensor:
        """Mean absolute error of the number of detected objects, (L,). Not trained on."""
        logits = outputs.pred_logits
        detected = (logits[..., :-1].amax(-1) >= logits[..., -1]).sum(-1)  # (L, B); argmax takes twice as long
        true = torch.tensor(objects.counts).to(detected.device, non_blocking=True)
        return (detected - true).abs().float().mean(1)

    @torch.no_grad()
    def class_error(self, outputs: DETROutput, objects: PaddedTargets, matches: Matches) -> Tensor:
        """Percentage of the last layer's matched queries that name a wrong class; 100 without objects."""
        pairs = len(matches.query) // len(outputs.pred_logits)
        if pairs == 0:
            return outputs.pred_logits.new_full((), 100.0)  # new_tensor would wait for the device
        _, image, query, target = (index[-pairs:] for index in matches)
        correct = outputs.pred_logits[-1, image, query].argmax(-1) == objects.labels[image, target]
        return 100 - 100 * correct.float().mean()
