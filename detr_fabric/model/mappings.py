"""Mappings from attention scores to attention weights: a new one is a function, and an entry in MAPPINGS.

Shapes: B batch, H heads, T queries, S keys. Every function takes scores (..., S) and returns weights of the same shape
and dtype, computed in float32 (float64 stays float64). A score of -inf forbids its key: the weight is exactly 0. A row
that forbids every key is all 0 (softmax is PyTorch's and gives NaN there; Padding leaves no such row).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fabric.config import AttnConfig, CrossMapping
from detr_fabric.model.entmax import entmax, entmax15, entmax_up_to, float_, softmax, sparsemax
from detr_fabric.model.tvmax import tvmax


def sigmoid(scores: Tensor) -> Tensor:
    """sigmoid(x - log n), n the number of allowed keys in the row (Ramapuram et al. 2024): keys do not compete."""
    x = float_(scores)
    allowed = (x > -math.inf).sum(-1, keepdim=True).clamp_min(1)
    return torch.sigmoid(x - allowed.log()).to(scores.dtype)


def relu(scores: Tensor) -> Tensor:
    """[x]_+ / sum [x]_+; a row without a positive score is all 0."""
    positive = float_(scores).relu()
    return (positive / positive.sum(-1, keepdim=True).clamp_min(1e-6)).to(scores.dtype)


def softmax1(scores: Tensor) -> Tensor:
    """exp(x) / (1 + sum exp(x)) (Miller 2023, "Attention is off by one"): the sum may be less than 1."""
    return softmax(torch.cat((scores, torch.zeros_like(scores[..., :1])), -1))[..., :-1]


def topk(scores: Tensor, k: int) -> Tensor:
    """softmax over the k largest scores of each row (Gupta et al. 2021), with every score that equals the k-th."""
    kth = scores.detach().topk(min(k, scores.shape[-1]), -1).values[..., -1:]
    return softmax(scores.masked_fill(scores < kth, -math.inf))


class Given(NamedTuple):
    """What a mapping may depend on besides the scores."""

    attn: AttnConfig
    learned: dict[str, Tensor]  # by name, each (H, 1, 1)
    grid: tuple[int, int] | None = None  # height and width, where the keys are image tokens


class Learned(NamedTuple):
    """A number that a mapping learns for each head.

    The optimizer keeps its parameter in the group "alpha"; logs and tables show the number.
    """

    name: str  # in logs and tables
    parameter: str  # in the state dict
    start: Callable[[AttnConfig], float]  # the parameter's initial value
    number: Callable[[Tensor, AttnConfig], Tensor]  # the parameter (H,), unbounded → the number (H,) it stands for


class Definition(NamedTuple):
    """How a mapping of AttnConfig is computed, and what it learns."""

    weights: Callable[[Tensor, Given], Tensor]  # scores (B, H, T, S) → weights (B, H, T, S)
    learned: tuple[Learned, ...] = ()


def alpha(logit: Tensor, attn: AttnConfig) -> Tensor:
    """The exponent of entmax-learned, inside attn.alpha_range."""
    low, high = attn.alpha_range
    return low + (high - low) * logit.sigmoid()


def alpha_logit(attn: AttnConfig) -> float:
    low, high = attn.alpha_range
    return math.log((attn.alpha - low) / (high - attn.alpha))


ALPHA = Learned(name="alpha", parameter="alpha_logit", start=alpha_logit, number=alpha)

MAPPINGS: dict[CrossMapping, Definition] = {
    "softmax": Definition(lambda scores, given: scores.softmax(-1)),
    "sparsemax": Definition(lambda scores, given: sparsemax(scores)),
    "entmax15": Definition(lambda scores, given: entmax15(scores)),
    "entmax": Definition(lambda scores, given: entmax(scores, given.attn.alpha)),
    "entmax-learned": Definition(
        lambda scores, given: entmax_up_to(given.attn.alpha_range[1], scores, given.learned["alpha"]), (ALPHA,)
    ),
    "sigmoid": Definition(lambda scores, given: sigmoid(scores)),
    "relu": Definition(lambda scores, given: relu(scores)),
    "softmax1": Definition(lambda scores, given: softmax1(scores)),
    "topk": Definition(lambda scores, given: topk(scores, given.attn.topk)),
    "tvmax": Definition(lambda scores, given: tvmax(scores, given.grid, given.attn.tv)),
}

LEARNED = {learned.parameter for definition in MAPPINGS.values() for learned in definition.learned}


def is_learned_by_a_mapping(parameter: str) -> bool:
    """Whether the parameter of this name in a state dict is one that only learned mappings have."""
    return parameter.rpartition(".")[2] in LEARNED
