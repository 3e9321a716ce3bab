"""How fast training goes, and how long it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Meter:
    """Images a second and the share of time spent waiting for data, since the last reading."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.restart()

    def restart(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, with the time taken to get each counted as waiting."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            self.steps += 1
            yield batch

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.started
        values = {"images_per_second": self.steps * self.images_per_step / elapsed, "data_wait": self.waited / elapsed}
        self.restart()
        return values
