"""log.jsonl holds every record once, and never stops a run."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

from detr_fabric.tracking.jsonl import RunLog


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_is_in_the_log_at_once_and_strict_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", 0, 0, print)
    log.write({"train/loss": 3.5, "grad_norm": float("inf")}, step=10, epoch=0.5)
    assert read_log(tmp_path / "log.jsonl") == [{"step": 10, "epoch": 0.5, "train/loss": 3.5, "grad_norm": None}]


def test_a_resumed_log_has_every_step_once_and_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path, 0, 0, print)
    for step in (10, 20, 30, 40):
        log.write({"train/loss": 1.0}, step, epoch=0.0)
    log.close()
    path.write_bytes(path.read_bytes() + b'{"step": 20, "tra')  # killed while writing
    log = RunLog(path, 20, 20, print)
    log.write({"train/loss": 2.0}, 30, epoch=0.0)
    assert [(record["step"], record["train/loss"]) for record in read_log(path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_costs_records_but_neither_the_run_nor_the_others(tmp_path: Path) -> None:
    path, said = tmp_path / "log.jsonl", list[str]()
    log = RunLog(path, 0, 0, said.append)
    log.write({"train/loss": 1.0}, 1, epoch=0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (path.stat().st_size + 7, limits[1])
    )  # the next record is torn by the limit
    try:
        log.write({"train/loss": 1.0}, 2, epoch=0.0)
        log.write({"train/loss": 1.0}, 3, epoch=0.0)
        log.write({"train/loss": 1.0}, 4, epoch=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write({"train/loss": 1.0}, 5, epoch=0.0)
    log.close()
    assert len(said) == 1 and "File too large" in said[0]
    RunLog(path, 9, 9, print).close()
    assert [record["step"] for record in read_log(path)] == [1, 5]
