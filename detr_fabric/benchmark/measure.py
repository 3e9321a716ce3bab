"""How everything here is timed: calls take turns in one process, and ratios are medians over the rounds."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
Row = dict[str, Any]  # one line of a table; always with `case` and `name`, what is compared and who ran it

PACKAGES = ("torch", "torchvision", "lightning-fabric", "transformers", "pillow", "pycocotools", "hotcoco")


class PartResult(NamedTuple):
    """What one part of the benchmark found."""

    rows: list[Row]
    missing: list[str] = []  # packages that are not installed, so that their rows are left out


def interleaved(
    calls: dict[str, Call],
    seconds: float,
    device: torch.device,
    least: int = 3,
    warm_up: bool = True,
    wall: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each call in rounds in which all take turns, so that a busy moment of the machine meets all of them.

    A round to warm up is not counted; then rounds for about `seconds`, at least `least`. On a CPU with one thread this
    is processor time, the same as wall time on an idle machine and hardly longer on a busy one. wall: not so, for calls
    whose work is done by other processes.
    """
    clock = time.perf_counter if wall else measuring_clock(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values() if warm_up else ():
        call()
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < end:
        for name, call in calls.items():
            synchronize(device)
            started = clock()
            call()
            synchronize(device)
            times[name].append(clock() - started)
    return times


def measuring_clock(device: torch.device) -> Callable[[], float]:
    """Processor time on a CPU with one thread, else wall time."""
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if one_thread else time.perf_counter


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(case: str, times: dict[str, list[float]], items: int = 1, unit: str = "call") -> list[Row]:
    """A row per call: milliseconds (median) and units per second, and `ratio`: its time over that of "ours" in the same
    round (median), so that 2 means that ours is twice as fast. items: units that a call works through."""
    return [
        {
            "case": case,
            "name": name,
            "ms": 1e3 * statistics.median(values) / items,
            f"{unit}s/s": items / statistics.median(values),
            "ratio": statistics.median(t / ours for t, ours in zip(values, times["ours"], strict=True)),
            "rounds": len(values),
        }
        for name, values in times.items()
    ]


def table(part: str, rows: list[Row]) -> str:
    """The rows as text, columns aligned."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[part if key == "case" else key for key in keys], *[[_cell(row.get(key)) for key in keys] for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(keys))]
    left = {column for column, key in enumerate(keys) if any(isinstance(row.get(key), str) for row in rows)}
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def machine(device: torch.device) -> dict[str, Any]:
    """Where this was measured."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def versions() -> dict[str, str | None]:
    """Python and the packages that matter; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of this package's checkout, marked where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None
