"""Options and paths that several tests share."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.patching import Patch, patched

GOLDEN = Path(__file__).parent / "golden"
LONG = [Path(__file__).parent / folder for folder in ("benchmark", "export", "processes")]


# Two processes run the tests, each with a thread of its own for arithmetic; torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU Triton's kernels run in its interpreter; Triton reads this when it is imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The same examples on every machine, however slow it is; --hypothesis-profile=default draws others each time.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")
# Where pytest runs in the background of a script, SIGINT is ignored, which every process of the tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=str(GOLDEN), help="folder of golden cases NAME.json and NAME.npz")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden-dir"))
        cases = sorted(p for p in folder.glob("*.json") if p.with_suffix(".npz").exists())
        assert cases, f"{folder} holds no golden case"
        metafunc.parametrize("golden_case", cases, ids=[p.stem for p in cases])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in LONG):
            item.add_marker("process")


@pytest.fixture
def patch() -> Iterator[Patch]:
    """patch(owner, name, replacement) replaces a function during the test, which fails if nothing calls it."""
    with contextlib.ExitStack() as replaced:
        yield lambda owner, name, replacement: replaced.enter_context(patched(owner, name, replacement))


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """A small COCO-format data set of real images that is not part of the repository."""
    default = Path(__file__).parents[2] / "shared" / "coco-mini"
    folder = Path(os.environ.get("DETR_FABRIC_COCO_MINI", default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set DETR_FABRIC_COCO_MINI to a folder in COCO's layout")
    return folder
