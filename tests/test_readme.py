"""The commands and the code that the READMEs and the presets show are ones that the package accepts."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from detr_fabric.cli import parse
from detr_fabric.train import parse_train
from tests.commands import REPOSITORY

SETTINGS = {"check": "CheckSettings", "analysis": "AnalysisSettings"}
TEXTS = [REPOSITORY / "README.md", REPOSITORY / "detr_fabric/README.md", *sorted(REPOSITORY.glob("experiments/*.py"))]
COMMAND = re.compile(r"-m detr_fabric\.(\w+)((?: +[^\s`#;&|]+)*)")  # up to a comment, or the end of a code span


def commands() -> list[tuple[str, list[str]]]:
    """Every `-m detr_fabric.TOOL arguments` of the texts; an ellipsis stands for a name that is not written out."""
    found: dict[str, tuple[str, list[str]]] = {}
    for text in TEXTS:
        content = re.sub(r"\\\n\s*", " ", text.read_text()).replace("$SLURM_ARRAY_TASK_ID", "3")
        for tool, rest in COMMAND.findall(content):
            args = shlex.split(rest)
            if not {"[", "PART"} & {*rest, *args}:
                found[f"{tool}{rest}"] = tool, args
    return list(found.values())


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with mine.py, the preset that the README shows."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(next(block for block in blocks if "config = " in block))
    monkeypatch.chdir(tmp_path)


def test_the_texts_have_commands() -> None:
    assert {tool for tool, _ in commands()} >= {"train", "evaluate", "predict", "check", "analysis", "export"}


@pytest.mark.usefixtures("user_folder")
@pytest.mark.parametrize("tool, args", commands(), ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_a_command_is_accepted(tool: str, args: list[str]) -> None:
    if tool == "train":
        parse_train(args)
    elif tool in ("benchmark", "replay"):
        module = importlib.import_module(f"detr_fabric.{tool}" + ".__main__" * (tool == "benchmark"))
        if args or tool == "benchmark":
            parse(module.Settings, args, module.PROG, module.ABOUT)
    elif args:
        module = importlib.import_module(f"detr_fabric.{tool}.settings")
        parse(getattr(module, SETTINGS.get(tool, "Settings")), args, f"python -m detr_fabric.{tool}", "")


def test_the_list_of_what_to_read_is_right_to_some_lines() -> None:
    text = (REPOSITORY / "README.md").read_text()
    rows = re.findall(r"\| \[[\w/.]+\]\((detr_fabric/[\w/.]+)\) \| (\d+) \|", text)
    (total,) = re.findall(r"([\d,]+) lines tell the whole of DETR", text)
    assert len(rows) >= 20
    assert int(total.replace(",", "")) == sum(int(lines) for _, lines in rows)
    for file, lines in rows:
        assert abs(int(lines) - len((REPOSITORY / file).read_text().splitlines())) <= 10, file


@pytest.mark.parametrize("text", ["README.md", "detr_fabric/README.md"])
def test_files_that_a_text_names_exist(text: str) -> None:
    file = REPOSITORY / text
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", file.read_text()) if "://" not in link]
    assert [link for link in links if not (file.parent / link).exists()] == []
    named = set(re.findall(r"`([\w/]+\.py)`", file.read_text())) - {"mine.py"}
    files = [f"/{path.relative_to(REPOSITORY)}" for path in REPOSITORY.rglob("*.py")]
    assert named
    assert sorted(name for name in named if not any(path.endswith(f"/{name}") for path in files)) == []
