"""Blocks of attention: exact in what is 0 and in their numbers, and within their budget."""

from __future__ import annotations

import base64
import math
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from detr_fabric.report.maps import ImageAttention, blocks, encoded, order, places


def decoded(block: str, rows: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """What maps.js makes of a block: weights (rows, cells) and numbers (rows, 5)."""
    raw = zlib.decompress(base64.b64decode(block))
    numbers = np.frombuffer(raw[rows * cells :], "<f4").reshape(rows, 5)
    codes = np.frombuffer(raw[: rows * cells], np.uint8).reshape(rows, cells)
    return numbers[:, :1] * (codes / 255.0) ** 2, numbers


def random_weights(*shape: int) -> Tensor:
    """Rows that sum to 1, a third of whose weights are 0 and some nearly."""
    torch.manual_seed(0)
    weights = torch.rand(shape) ** 4
    weights[torch.rand(shape) < 1 / 3] = 0
    weights[..., 0] = 1e-9
    return weights / weights.sum(-1, keepdim=True)


def test_a_block_is_0_exactly_where_the_weights_are_and_elsewhere_right_to_one_percent_of_the_largest() -> None:
    weights = random_weights(6, 40)
    read, _ = decoded(encoded(weights, None), 6, 40)
    assert np.array_equal(read == 0, weights.numpy() == 0)
    largest = weights.amax(-1, keepdim=True).numpy()
    assert (np.abs(read - weights.numpy()) / largest).max() < 0.01


def test_numbers_of_a_block_equal_slow_references() -> None:
    weights = random_weights(3, 8)
    box = torch.tensor([[0.25, 0.0, 0.75, 0.5]]).repeat(3, 1)  # of a 2×4 grid: the middle two cells above
    attention = ImageAttention([weights[None]], [random_weights(1, 8, 8)], (2, 4))
    _, numbers = decoded(blocks(attention, [2, 0, 1], box, 1e9)["cross/0/mean"], 3, 8)
    for row, query in zip(numbers, [2, 0, 1], strict=True):
        values = weights[query].tolist()
        slow = [
            max(values),
            sum(value != 0 for value in values),
            sum(value <= 1e-6 for value in values),
            -sum(value * math.log(value) for value in values if value > 0),
            (values[1] + values[2]) / sum(values),
        ]
        assert row.tolist() == pytest.approx(slow, rel=1e-5)


def test_a_mapping_that_reads_nothing_gives_a_block_of_nothing() -> None:
    read, numbers = decoded(encoded(torch.zeros(2, 9), torch.ones(2, 9)), 2, 9)
    assert not read.any() and numbers[:, [0, 1, 3, 4]].tolist() == [[0.0] * 4] * 2


def test_blocks_stop_at_the_budget_and_what_matters_most_comes_first() -> None:
    attention = ImageAttention(
        [random_weights(2, 5, 12) for _ in range(3)], [random_weights(2, 12, 12) for _ in range(2)], (3, 4)
    )
    boxes = torch.tensor([[0.1, 0.1, 0.9, 0.9]]).repeat(5, 1)
    everything = blocks(attention, range(5), boxes, 1e9)
    assert len(everything) == 3 * 3 + 2 * 3
    assert list(everything)[:3] == ["cross/2/mean", "encoder/1/mean", "cross/1/mean"]
    budget = 3000
    some = blocks(attention, range(5), boxes, budget)
    assert list(some) == list(everything)[: len(some)] and 0 < sum(map(len, some.values())) <= budget
    assert list(blocks(attention, range(5), boxes, 1)) == ["cross/2/mean"]  # one at least
    assert len(set(order(attention))) == len(everything)


def test_a_mean_is_0_only_where_every_head_is() -> None:
    heads = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])
    attention = ImageAttention([heads], [], (1, 3))
    read, numbers = decoded(blocks(attention, [0], torch.ones(1, 4), 1e9)["cross/0/mean"], 1, 3)
    assert read[0].tolist() == pytest.approx([0.5, 0.5, 0.0]) and numbers[0, 1] == 2


@pytest.mark.parametrize("grid", [(8, 8), (12, 12), (25, 34), (1, 500), (2, 3)])
def test_places_cover_the_image_evenly_and_are_not_too_many(grid: tuple[int, int]) -> None:
    h, w = grid
    kept = places(grid)
    assert 0 < len(kept) <= 144 and all(0 <= token < h * w for token in kept)
    if h * w <= 144:
        assert kept == list(range(h * w))
    step = max(1, round(math.sqrt(h * w / len(kept))))
    for token in range(h * w):  # none is farther away than the step from one that is kept
        assert min(max(abs(token // w - k // w), abs(token % w - k % w)) for k in kept) <= 2 * step
