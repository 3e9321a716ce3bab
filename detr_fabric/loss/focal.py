"""`--loss.kind focal`: sigmoid focal loss (Lin et al. 2017, equation 5) for cross-entropy, and its matching cost.

Every class is a question of its own, and there is no "no object": a query that finds nothing says no to all of them.
Easy answers, which most are, count little. As in Deformable and Conditional DETR.

Shapes: L decoder layers, B batch, Q queries, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ALPHA, GAMMA = 0.25, 2.0  # the weight of a yes (of a no: 1 - ALPHA), and how little easy answers count


def focal_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """The loss summed over images, queries and classes, (L,).

    logits (L, B, Q, C); classes (L, B, Q) int64: the class that a query should find, C where it should find none.
    """
    yes = F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)  # (L, B, Q, C)
    probability = logits.sigmoid()
    wrong = yes * (1 - probability) + (1 - yes) * probability
    weight = yes * ALPHA + (1 - yes) * (1 - ALPHA)
    loss = weight * wrong**GAMMA * F.binary_cross_entropy_with_logits(logits, yes, reduction="none")
    return loss.flatten(1).sum(1)


def focal_cost(logits: Tensor) -> Tensor:
    """What a match changes in the loss: that of a yes less that of a no, for logits (...) of an object's class."""
    probability = logits.sigmoid()
    yes = -ALPHA * (1 - probability) ** GAMMA * (probability + 1e-8).log()
    no = -(1 - ALPHA) * probability**GAMMA * (1 - probability + 1e-8).log()
    return yes - no
