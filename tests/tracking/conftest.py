"""A machine where W&B was never configured, and processes that are quick to start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from tests.commands import REPOSITORY
from tests.tracking.nursery import NURSERY


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine where W&B was never configured; `home / "run"` is the run folder."""
    for key in [key for key in os.environ if key.startswith("WANDB_") or key == "NETRC"]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    yield tmp_path
    wandb.teardown()  # or the next test inherits the environment of this one


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join([str(REPOSITORY), *sys.path])
    command, environment = [sys.executable, "-c", NURSERY], {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
