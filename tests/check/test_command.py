"""The command line of the check."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import sys
from pathlib import Path

import pytest

from detr_fabric.check.report import check
from detr_fabric.check.settings import CheckSettings
from tests.checking import checked, clean
from tests.coco_files import write_images, write_json
from tests.terminals import written


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "ANNOTATIONS.json, or --root"),
        (["gone.json"], "gone.json is no file"),
        (["."], "is no file"),
        (["a.json", "--images", "gone"], "gone is no folder"),
        (["a.json", "--root", "."], "--root goes without"),
        (["--root", ".", "--fix", "b.json"], "--root goes without"),
        (["--root", "gone"], "instances_train2017.json is no file"),
        (["a.json", "--annotations-only"], "--annotations-only goes with --root"),
        (["a.json", "--fix", "."], "is a folder"),
        (["a.json", "--fix", "gone/b.json"], "in a folder that exists"),
        (["a.json", "--queries", "0"], "1 or more"),
        (["a.json", "--workers", "0"], "1 or more"),
        (["a.json", "--show", "-1"], "0 or more"),
        (["a.json", "--train-annotations", "gone.json"], "gone.json does not exist"),
        (["a.json", "--train-annotations", "broken.json"], "broken.json is broken JSON"),
        (["a.json", "--nonsense"], "--nonsense"),
        (["a.json", "b.json"], "b.json"),
        (["a.json", "--label-space", "coco"], "contiguous"),
    ],
)
def test_wrong_commands_end_with_2_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "a.json", clean())
    (tmp_path / "broken.json").write_text("{")
    code, report, error = checked(*args)
    assert code == 2 and expected in " ".join(error.replace("│", "").split()) and "not accept" not in report


def test_progress_is_a_bar_on_a_terminal_and_silent_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    path, folder = write_json(tmp_path / "a.json", clean()), write_images(tmp_path / "images", clean())
    assert checked(path, "--images", folder, "--workers", "1")[2] == ""
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as terminal, contextlib.redirect_stdout(io.StringIO()), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert check(CheckSettings(str(path), str(folder), workers=1))
    assert "2/2" in written(parent)
