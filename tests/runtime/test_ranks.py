"""Reductions over ranks give the right value with one collective each, and none where a process is alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from detr_fabric.runtime.preemption import Preemption
from detr_fabric.runtime.ranks import max_over_ranks, mean_over_ranks, sum_over_ranks

REDUCTIONS = (sum_over_ranks, mean_over_ranks, max_over_ranks)


def count_collectives(action: Callable[[], object]) -> list[str]:
    """The names of the collectives that gloo's profiler sees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    return [event.name for event in profile.events() if event.name.startswith("gloo:")]


def as_rank(rank: int, file: str, results: multiprocessing.Queue[object]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    values = torch.tensor([1.0, 6.0]) * (rank + 1)
    reduced: dict[str, list[float]] = {}
    counted = count_collectives(
        lambda: reduced.update({reduce.__name__: reduce(values).tolist() for reduce in REDUCTIONS})
    )
    preemption = Preemption()
    preemption.requested = "SIGTERM" if rank == 1 else None
    fabric = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    asked = count_collectives(lambda: reduced.update(agreed=[preemption.agreed(fabric)]))
    results.put((rank, reduced, counted, asked, values.tolist()))
    dist.destroy_process_group()


@pytest.fixture
def two_ranks(tmp_path: Path) -> Iterator[list[tuple[int, dict[str, list[float]], list[str], list[str], list[float]]]]:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=as_rank, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for process in processes:
        process.start()
    yield sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()


@pytest.mark.process
def test_a_reduction_over_two_ranks_is_right_and_one_collective(two_ranks: list) -> None:
    for rank, reduced, counted, asked, values in two_ranks:
        assert reduced["sum_over_ranks"] == [3.0, 18.0]
        assert reduced["mean_over_ranks"] == [1.5, 9.0]
        assert reduced["max_over_ranks"] == [2.0, 12.0]
        assert reduced["agreed"] == [True]
        assert counted == ["gloo:all_reduce"] * 3 and asked == ["gloo:all_reduce"]
        assert values == [rank + 1.0, 6.0 * (rank + 1)]  # the argument is left as it was


def test_a_process_alone_gets_its_own_values_back() -> None:
    values = torch.tensor([2.0, 4.0])
    assert all(torch.equal(reduce(values), values) for reduce in REDUCTIONS)
