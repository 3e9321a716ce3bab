"""A patch on a name that nothing calls fails: within a test, and in the processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.commands import Job, python
from tests.patching import EXIT_NOT_CALLED, patch, patched

SENTENCE = "replaced, but nothing called it: os.getlogin"


def test_a_replacement_that_nothing_calls_fails_the_test_and_is_taken_back() -> None:
    original = os.getlogin
    with pytest.raises(AssertionError, match=SENTENCE), patched(os, "getlogin", lambda: "me"):
        os.getpid()
    assert os.getlogin is original
    with patched(os, "getlogin", lambda: "me"):
        assert os.getlogin() == "me"


def patch_in_vain() -> None:
    patch(os, "getlogin", lambda: "me")


def test_a_job_whose_patch_nothing_called_says_so_and_fails(tmp_path: Path) -> None:
    job = Job("--preset", "debug", "--train.epochs", "0", cwd=tmp_path, target=patch_in_vain)
    assert job.wait() == [EXIT_NOT_CALLED] and SENTENCE in job.text(), job.text()


@pytest.mark.parametrize(("last", "code"), [("os.getpid()", EXIT_NOT_CALLED), ("os.getlogin()", 0)])
def test_so_does_a_process_of_any_launcher(last: str, code: int, tmp_path: Path) -> None:
    source = f"import os; from tests.patching import patch; patch(os, 'getlogin', lambda: 'me'); {last}"
    ended = python("-c", source, cwd=tmp_path)
    assert ended.returncode == code and (SENTENCE in ended.stderr) == (code != 0), ended.stderr
