"""A checkpoint that the tests of prediction share."""

from __future__ import annotations

import pytest

from tests.predict.small import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.ckpt")
