"""The examples in the docstrings do what they show."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from detr_fabric import load, terminal
from detr_fabric.predict import detector, found
from tests.predict.small import write_known

EXAMPLES = [
    example
    for module in (detector, found, terminal)
    for example in doctest.DocTestFinder().find(module)
    if example.examples
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_known(folder := tmp_path_factory.mktemp("examples"))
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name.removeprefix("detr_fabric.predict."))
def test_an_example_does_what_it_shows(
    example: doctest.DocTest, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    example.globs["detr"] = load("best.ckpt", "cpu")
    failed = doctest.DocTestRunner().run(example).failed
    assert not failed, capsys.readouterr().out


def test_there_are_examples_of_what_is_found() -> None:
    names = {example.name.rpartition(".")[2] for example in EXAMPLES}
    assert names >= {"Found", "__getitem__", "draw", "save", "to_dict", "to_coco", "to_pandas", "to_supervision"}
    assert names >= {"detector", "names", "__call__", "stream", "attention"}
