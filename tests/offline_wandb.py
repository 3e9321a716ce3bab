"""Reads back what an offline W&B run wrote, so that tests can ask for a value instead of believing a call.

A .wandb file is a 7-byte header, then LevelDB's log format: blocks of 32 KiB with fragments of records, each behind
4 bytes of checksum, 2 of length and 1 of type (1 whole, 2 first, 3 middle, 4 last). A record is a protobuf message.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK, FRAGMENT = 7, 32768, 7
WHOLE, LAST = 1, 4


@dataclass
class OfflineRun:
    """One start of a run. A run that was resumed offline has several, with the same id."""

    folder: Path
    id: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    step_metrics: dict[str, str] = field(default_factory=dict)  # name or glob → the metric on its x axis
    commit: str = ""  # as W&B's own metadata has it
    preempting: bool = False
    exit_code: int | None = None  # None: never finished

    def values(self, name: str) -> dict[int, Any]:
        """A metric by step."""
        return {row["step"]: row[name] for row in self.history if name in row}

    def file(self, media: dict[str, Any]) -> Path:
        """Where the file behind a media value of the history lies."""
        return self.folder / "files" / media["path"]


def read_runs(run_dir: Path) -> list[OfflineRun]:
    """All offline starts below a run folder, oldest first."""
    return [read_run(path) for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]


def read_run(path: Path) -> OfflineRun:
    """One .wandb file, as far as it was written."""
    run = OfflineRun(path.parent)
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.project, run.name = record.run.run_id, record.run.project, record.run.display_name
            run.group, run.tags = record.run.run_group, list(record.run.tags)
            run.config |= _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "metric":
            run.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "environment" and record.environment.git.commit:
            run.commit = record.environment.git.commit
        elif kind == "preempting":
            run.preempting = True
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    """Decoded values by key; W&B spreads the entries of a dict over several items."""
    values: dict[str, Any] = {}
    for item in items:
        *parents, key = list(item.nested_key) or [item.key]
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = json.loads(item.value_json)
    return values


def _records(data: bytes) -> Iterator[Any]:
    assert data[:4] == b":W&B", f"not a W&B file: {data[:HEADER]!r}"
    position, record = HEADER, b""
    while position + FRAGMENT <= len(data):
        if (left := BLOCK - position % BLOCK) < FRAGMENT:  # the rest of a block that is too short for a fragment
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + FRAGMENT])
        position += FRAGMENT
        if kind == 0 or position + length > len(data):  # padding, or torn by a kill
            return
        record += data[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            message = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            message.ParseFromString(record)
            record = b""
            yield message
