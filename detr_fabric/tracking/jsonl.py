"""log.jsonl: every number of a run, a JSON object a record."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from detr_fabric.tracking.console import Values


class RunLog:
    """log.jsonl: one JSON object a record, handed to the system at once.

    Opened for a resumed run, it first drops what came after `resumed_step` and the line that a kill tore, so every step
    is there once. A full disk costs records and one warning through `say`, not the run; a folder that was removed is
    made again. Numbers that are not finite become null.
    """

    def __init__(self, path: Path, resumed_step: int, evaluated: int, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._torn = self._warned = False
        _cut(path, resumed_step, evaluated)
        self._file = path.open("ab", buffering=0)  # one system call a record: a kill tears one line at most

    def write(self, values: Values, step: int, epoch: float) -> None:
        record = {"step": step, "epoch": epoch, **values}
        strict = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        line = b"\n" * self._torn + json.dumps(strict).encode() + b"\n"
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                removed, self._file = self._file, self._path.open("ab", buffering=0)
                removed.close()
                self._say(f"{self._path}: removed by somebody; training goes on, with new records from step {step}")
            self._torn = self._file.write(line) < len(line)
        except OSError as error:
            self._torn = True
            if not self._warned:
                self._say(f"{self._path}: {error.strerror}; training goes on, but records are missing from step {step}")
                self._warned = True

    def close(self) -> None:
        self._file.close()


def _cut(path: Path, last_step: int, evaluated: int) -> None:
    """Drops torn lines, the records after last_step and the evaluations after the step `evaluated`, which will be made
    again; a kill meanwhile leaves the old log or the new one."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [
        line
        for line in lines
        if line.endswith(b"\n") and _step_of(line) <= (evaluated if b'"val/' in line else last_step)
    ]
    if kept != lines:
        new = path.with_name(path.name + ".tmp")
        with new.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
