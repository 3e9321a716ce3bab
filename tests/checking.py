"""Runs the check of a data set in this process, and reads its report."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from detr_fabric.check import __main__ as command
from tests.coco_files import coco, thing


def checked(*args: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        command.main([str(arg) for arg in args])
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def found(report: str) -> dict[str, tuple[str, int, str]]:
    """What was found → what training does, number of entries, and the entries."""
    rows = re.findall(r"^  (refuses|stops|drops|clips|keeps) +([\d,]+)  (.*?)(?:  .*)?\n((?: {19}.*\n)*)", report, re.M)
    return {
        what.strip(): (training, int(count.replace(",", "")), " ".join(ids.split()))
        for training, count, what, ids in rows
    }


def clean() -> dict[str, Any]:
    """A data set of which there is nothing to say."""
    return coco(None, [thing(1, 1), thing(2, 2, category=2), thing(3, 1, box=[1, 2, 3, 4])])
