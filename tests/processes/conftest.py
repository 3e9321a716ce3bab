"""What several tests of whole runs start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import debug_job


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder; "whole" is a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("user")
    assert debug_job(folder, "whole").wait() == [0]
    return folder
