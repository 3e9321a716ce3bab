"""Losses over a validation set, as the original logs them beside AP."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fabric.data.batch import Target
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.model.detr import DETROutput
from detr_fabric.runtime.ranks import of_every_rank


class ValidationLosses:
    """Adds up losses and metrics of batches; the result does not depend on the batch size.

    Box and class losses are divided by num_boxes and class_weight_sum of the whole set, as if it were one batch;
    class_error is a mean over matched queries, other metrics over images. Images that could not be read are left out;
    those that sharding repeats count twice.
    """

    def __init__(self, criterion: SetCriterion) -> None:
        self.criterion = criterion
        self._sums: dict[str, Tensor | float] = {}  # of losses, and of metrics times what they are means of
        self._counts = {"num_boxes": 0.0, "class_weight_sum": 0.0, "matched": 0.0, "images": 0.0}

    @torch.no_grad()
    def add(self, outputs: DETROutput, targets: list[Target]) -> None:
        """A batch that was evaluated: outputs of all layers, and its targets on the same device."""
        readable = [index for index, target in enumerate(targets) if target.read_error is None]
        if len(readable) < len(targets):
            outputs = DETROutput(outputs.pred_logits[:, readable], outputs.pred_boxes[:, readable])
            targets = [targets[index] for index in readable]
        if not targets:
            return
        found = self.criterion(outputs, targets, num_boxes=1.0, class_weight_sum=1.0)
        queries = outputs.pred_logits.shape[2]
        matched = sum(min(len(target.labels), queries) for target in targets)
        metrics = {
            name: value * (matched if name == "class_error" else len(targets)) for name, value in found.metrics.items()
        }
        for name, value in (found.losses | metrics).items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
        added = (*self.criterion.normalizers(targets, queries), matched, len(targets))
        self._counts = {name: count + more for (name, count), more in zip(self._counts.items(), added, strict=True)}

    def means(self) -> dict[str, float]:
        """loss (the weighted total), its parts and the metrics, over all ranks; every rank must call."""
        mine = {name: float(value) for name, value in self._sums.items()}
        ranks = of_every_rank(mine | self._counts)
        names = dict.fromkeys(name for rank in ranks for name in rank)
        total = {name: sum(rank.get(name, 0.0) for rank in ranks) for name in names}
        num_boxes, class_weight_sum, matched, images = (total.pop(name) for name in self._counts)
        means, loss = {}, 0.0
        for name, value in total.items():
            if name.startswith("loss"):
                means[name] = value / ((class_weight_sum or 1.0) if name.startswith("loss_ce") else max(num_boxes, 1.0))
                loss += self.criterion.weight(name) * means[name]
            elif name == "class_error":
                means[name] = value / matched if matched else 100.0
            else:
                means[name] = value / images
        return {"loss": loss, **means} if images else {}
