"""The set criterion: match, then score classes and boxes (Carion et al. 2020, equation 2).

Shapes: L decoder layers, B batch, Q queries, C classes, P matched pairs of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fabric.boxes import cxcywh_to_xyxy, generalized_iou
from detr_fabric.config import LossConfig
from detr_fabric.data.batch import MicroBatch, Target, normalize
from detr_fabric.loss.focal import focal_loss
from detr_fabric.loss.matcher import HungarianMatcher, Matches, PaddedTargets, pad_targets
from detr_fabric.model.detr import DETROutput


class Losses(NamedTuple):
    """What the criterion says of a batch. All values are scalars under the original's names; those of the auxiliary
    layers end with the layer's number (loss_ce_0)."""

    total: Tensor  # () weighted sum of the losses of all layers: what is minimised
    losses: dict[str, Tensor]  # unweighted, divided by the effective batch: over micro-batches they add up
    metrics: dict[str, Tensor]  # means over this batch, not trained on


class SetCriterion(nn.Module):
    """Matches every layer's queries with the objects, then scores classes and boxes of all layers at once."""

    class_weights: Tensor  # (C+1,)

    def __init__(self, num_classes: int, config: LossConfig | None = None) -> None:
        super().__init__()
        config = config or LossConfig()
        self.num_classes = num_classes
        self.focal = config.focal
        self.matcher = HungarianMatcher(config.cost_class, config.cost_bbox, config.cost_giou, self.focal)
        self.weights = {"loss_ce": config.ce_coef, "loss_bbox": config.bbox_coef, "loss_giou": config.giou_coef}
        self.eos_coef, self.aux_loss = config.eos_coef, config.aux_loss
        class_weights = torch.ones(num_classes + 1)
        class_weights[-1] = config.eos_coef
        self.register_buffer("class_weights", class_weights)

    def weight(self, name: str) -> float:
        """Weight of a loss in the total, also of an auxiliary layer's (loss_ce_0)."""
        return self.weights[re.sub(r"_\d+$", "", name)]

    def normalizers(self, targets: Sequence[Target], num_queries: int) -> tuple[float, float]:
        """(num_boxes, class_weight_sum) of these images, by which box and class losses are divided.

        Both follow from the object counts alone, because min(objects, queries) queries of every image are matched. So
        they can be added over micro-batches and averaged over ranks before the first forward pass.
        """
        matched = sum(min(len(t.labels), num_queries) for t in targets)
        unmatched = num_queries * len(targets) - matched
        num_boxes = float(sum(len(t.labels) for t in targets))
        return num_boxes, num_boxes if self.focal else matched + self.eos_coef * unmatched

    def forward(
        self,
        outputs: DETROutput,
        targets: list[Target],
        num_boxes: float | Tensor,
        class_weight_sum: float | Tensor | None = None,
    ) -> Losses:
        """Losses of a batch, float32.

        num_boxes: objects by which box losses are divided, at least 1: of the effective batch, averaged over ranks.
        class_weight_sum: the same for the classification loss; None: of this batch, as the original does on each rank.
        """
        if not self.aux_loss:
            outputs = DETROutput(outputs.pred_logits[-1:], outputs.pred_boxes[-1:])
        objects = pad_targets(targets)
        matches = self.matcher(outputs, objects)
        if self.focal:
            class_weight_sum = num_boxes
        elif class_weight_sum is None:
            class_weight_sum = self.normalizers(targets, outputs.pred_logits.shape[2])[1]
        losses = {
            "loss_ce": self.loss_labels(outputs, objects, matches) / class_weight_sum,
            **{name: value / num_boxes for name, value in self.loss_boxes(outputs, objects, matches).items()},
        }  # each (L,)
        total = torch.stack([self.weights[name] * value.sum() for name, value in losses.items()]).sum()
        metrics = {"class_error": self.class_error(outputs, objects, matches)}
        cardinality_error = self.cardinality_error(outputs, objects)
        return Losses(total, _by_layer(losses), metrics | _by_layer({"cardinality_error": cardinality_error}))

    def loss_labels(self, outputs: DETROutput, objects: PaddedTargets, matches: Matches) -> Tensor:
        """Weighted cross-entropy summed over images and queries, (L,); unmatched queries should say "no object"."""
        logits = outputs.pred_logits.float()  # (L, B, Q, C+1), or C with focal loss
        classes = torch.full(logits.shape[:3], self.num_classes, device=logits.device)
        classes[matches.layer, matches.image, matches.query] = objects.labels[matches.image, matches.target]
        if self.focal:
            return focal_loss(logits, classes)
        loss = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), self.class_weights, reduction="none")
        return loss.view(len(logits), -1).sum(1)

    def loss_boxes(self, outputs: DETROutput, objects: PaddedTargets, matches: Matches) -> dict[str, Tensor]:
        """L1 and generalised IoU losses summed over matched pairs, each (L,); without objects a 0 with a gradient."""
        boxes = outputs.pred_boxes.float()
        predicted = boxes[matches.layer, matches.image, matches.query].view(len(boxes), -1, 4)  # (L, P, 4)
        ground_truth = objects.boxes[matches.image, matches.target].view(len(boxes), -1, 4)
        giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(ground_truth))
        return {"loss_bbox": (predicted - ground_truth).abs().sum((1, 2)), "loss_giou": (1 - giou).sum(1)}

    @torch.no_grad()
    def cardinality_error(self, outputs: DETROutput, objects: PaddedTargets) -> Tensor:
        """Mean absolute error of the number of detected objects, (L,)."""
        logits = outputs.pred_logits
        found = logits.amax(-1) > 0 if self.focal else logits[..., :-1].amax(-1) >= logits[..., -1]
        detected = found.sum(-1)  # (L, B); argmax takes twice as long
        counts = torch.tensor(objects.counts).to(detected.device, non_blocking=True)
        return (detected - counts).abs().float().mean(1)

    @torch.no_grad()
    def class_error(self, outputs: DETROutput, objects: PaddedTargets, matches: Matches) -> Tensor:
        """Percentage of the last layer's matched queries that name a wrong class; 100 without objects."""
        pairs = len(matches.query) // len(outputs.pred_logits)
        if pairs == 0:
            return outputs.pred_logits.new_full((), 100.0)  # new_tensor would wait for the device
        _, image, query, target = (index[-pairs:] for index in matches)
        correct = outputs.pred_logits[-1, image, query].argmax(-1) == objects.labels[image, target]
        return 100 - 100 * correct.float().mean()


def _by_layer(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """(L,) values as L scalars: the last layer's under the plain name, earlier ones with their number."""
    scalars: dict[str, Tensor] = {}
    for name, value in values.items():
        *auxiliary, last = value.detach().unbind()
        scalars |= {name: last} | {f"{name}_{layer}": scalar for layer, scalar in enumerate(auxiliary)}
    return scalars


def forward_backward(
    model: Callable[[Tensor, Tensor], DETROutput],
    criterion: SetCriterion,
    micro_batch: MicroBatch,
    normalizers: Tensor,
    backward: Callable[[Tensor], None],
) -> Losses:
    """A micro-batch forward, through the criterion and backward: what training, `nonfinite` and `preflight` all run.

    normalizers: (2,) num_boxes and class_weight_sum of the effective batch. A loss that is not finite gets a gradient
    of NaN, whose average over ranks tells all of them.
    """
    batch, targets = micro_batch
    num_boxes, class_weight_sum = normalizers
    class_weight_sum = class_weight_sum + (class_weight_sum == 0)  # no object, and eos_coef 0: nothing is weighed
    losses: Losses = criterion(model(*normalize(batch)), targets, num_boxes.clamp(min=1), class_weight_sum)
    backward(losses.total * (1 + 0 * losses.total.detach()))
    return losses._replace(total=losses.total.detach())


def add_losses(parts: Sequence[Losses], images: Sequence[int]) -> Losses:
    """The losses of an effective batch from those of its micro-batches, of so many images each.

    Each loss was already divided by numbers of the effective batch, so losses add up. Metrics are averaged, weighted by
    image count.
    """
    if len(parts) == 1:
        return parts[0]
    shares = [count / sum(images) for count in images]
    return Losses(
        torch.stack([part.total for part in parts]).sum(),
        {name: torch.stack([part.losses[name] for part in parts]).sum() for name in parts[0].losses},
        {
            name: torch.stack([part.metrics[name] * share for part, share in zip(parts, shares, strict=True)]).sum()
            for name in parts[0].metrics
        },
    )
