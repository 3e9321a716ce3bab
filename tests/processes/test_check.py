"""The check as a process: help without torch, a closed pipe, Ctrl+C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.checking import clean
from tests.coco_files import coco, write_json
from tests.commands import environment, python
from tests.faults import until


def test_help_explains_everything_and_annotations_are_checked_without_torch(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", clean())
    script = (
        "import sys; from detr_fabric.check import __main__ as check\n"
        "try: check.main(sys.argv[1:])\n"
        "except SystemExit as end: print('code', end.code, 'torch' in sys.modules)"
    )
    assert "code 0 False" in python("-c", script, str(path), "--fix", "out.json", cwd=tmp_path).stdout
    text = python("-c", script, "--help", cwd=tmp_path).stdout
    assert "code 0 False" in text
    for word in (
        "Exit code: 0",
        "ANNOTATIONS.json",
        "refuses",
        "With --fix it writes",
        "--images FOLDER",
        "--queries INT",
    ):
        assert word in text


COUNTING = """
import sys
from contextlib import contextmanager
from detr_fabric.check import __main__ as check, report
from tests.patching import patch

@contextmanager
def counted(what, total):
    yield lambda done: print(done, "of", total, what, file=sys.stderr, flush=True)

patch(report, "counted", counted)
check.main(sys.argv[1:])
"""


def gone(group: int) -> bool:
    """Whether no process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_closed_pipe_and_ctrl_c_end_it_without_a_traceback_or_an_orphan(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)).save(tmp_path / "a.jpg")
    content = coco([{"id": n, "file_name": "a.jpg"} for n in range(3000)], [])
    path = write_json(tmp_path / "a.json", content)
    args = [sys.executable, "-c", COUNTING, str(path), "--images", str(tmp_path), "--workers", "2"]
    with subprocess.Popen(
        args, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stderr.readline().endswith(" of 3000 images\n")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()
    until(lambda: gone(process.pid))
    piped = subprocess.run(
        [
            "bash",
            "-c",
            '"$0" -m detr_fabric.check "$1" --show 0 | true; echo "code ${PIPESTATUS[0]}"',
            sys.executable,
            path,
        ],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert piped.stderr == "" and "code 1" in piped.stdout
