"""The order of images: a pure function, the same global batches on any number of ranks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detr_fabric.data.sampler import WHOLE, Shard, eval_batches, step_batches, steps_per_epoch
from detr_fabric.errors import UserError


def global_batches(images: int, epoch: int, batch: int, accumulate: int, world: int) -> list[list[int]]:
    """What all ranks together see in each step, in rank and micro-batch order."""
    ranks = [step_batches(images, 3, epoch, batch, accumulate, Shard(rank, world)) for rank in range(world)]
    return [[i for rank in ranks for micro in rank[step] for _, i in micro] for step in range(len(ranks[0]))]


@pytest.mark.parametrize(
    ("batch", "accumulate", "world"), [(8, 1, 1), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (2, 1, 4), (1, 2, 4)]
)
def test_every_split_of_a_global_batch_sees_the_same_images(batch: int, accumulate: int, world: int) -> None:
    assert global_batches(61, 5, batch, accumulate, world) == global_batches(61, 5, 8, 1, 1)


def test_an_epoch_is_a_permutation_without_the_last_incomplete_batch() -> None:
    seen = [index for batch in global_batches(61, 0, 2, 2, 2) for index in batch]
    assert len(seen) == len(set(seen)) == 56
    assert set(seen) <= set(range(61))


def test_order_depends_on_epoch_and_seed_only() -> None:
    orders = [step_batches(40, seed, epoch, 4, 1, WHOLE) for seed in (0, 1) for epoch in (0, 1)]
    indices = [[index for step in order for micro in step for _, index in micro] for order in orders]
    assert len({tuple(order) for order in indices}) == 4
    state = random.getstate()
    random.seed(7)
    assert step_batches(40, 1, 1, 4, 1, WHOLE) == orders[3]
    random.setstate(state)


def test_order_is_pinned_so_that_runs_can_be_resumed_by_later_versions() -> None:
    assert step_batches(10, 42, 3, 2, 2, WHOLE) == [
        [[(3, 4), (3, 2)], [(3, 9), (3, 1)]],
        [[(3, 5), (3, 8)], [(3, 6), (3, 7)]],
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 8))
def test_skipping_leaves_out_exactly_the_first_steps(
    images: int, batch: int, accumulate: int, world: int, skip: int
) -> None:
    if images < batch * accumulate * world:
        with pytest.raises(UserError, match="--train.batch-size"):
            steps_per_epoch(images, batch, accumulate, world)
        return
    last = Shard(world - 1, world)
    everything = step_batches(images, 0, 2, batch, accumulate, last)
    assert len(everything) == steps_per_epoch(images, batch, accumulate, world)
    assert step_batches(images, 0, 2, batch, accumulate, last, skip) == everything[skip:]


def test_too_few_images_name_the_numbers_and_the_flag() -> None:
    with pytest.raises(UserError, match=r"7 training images .* 8 \(2 ranks x 2 .* x 2 .*--train.batch-size"):
        step_batches(7, 0, 0, 2, 2, Shard(0, 2))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 6))
def test_ranks_evaluate_everything_in_equal_shares(images: int, world: int, batch: int) -> None:
    order = [3 * index for index in range(images)]
    ranks = [eval_batches(order, batch, Shard(rank, world)) for rank in range(world)]
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    assert all(len(samples) == batch for batches in ranks for samples in batches[:-1])
    everything = [index for batches in ranks for samples in batches for index in samples]
    assert set(everything) == set(order)
    assert len(everything) - images < world
    in_turn = [index for batches in zip(*ranks, strict=True) for samples in batches for index in samples]
    assert in_turn == sorted(in_turn)  # neighbours stay together


def test_an_empty_data_set_is_evaluated_at_once() -> None:
    assert eval_batches([], 4, Shard(1, 2)) == []
