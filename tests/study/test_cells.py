"""Study files, cells and when one is done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from detr_fabric.config import AttnConfig, Config, OptimConfig, TrainConfig
from detr_fabric.errors import UserError
from detr_fabric.study.cells import Cell, cells, final_records, load_study
from detr_fabric.study.settings import Study
from detr_fabric.train import parse_train

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.process
@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*_study.py")), ids=lambda file: file.stem)
def test_every_cell_of_our_studies_is_a_command_that_gives_its_settings(file: Path) -> None:
    study = load_study(str(file))
    made = cells(study, Path("runs") / file.stem)
    assert len({cell.folder for cell in made}) == len(made) == len(study.configs) * len(study.seeds)
    for cell in made[: len(study.configs)]:
        assert parse_train(cell.command()[3:]) == cell.config.resolve()
    if study.numbers is not None:
        assert [float(name) for name in study.configs] == sorted(map(float, study.configs))


def test_the_command_that_resumes_a_cell_gives_its_settings_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (made,) = cells(Study({"a": Config(optim=OptimConfig(lr=0.5))}, seeds=(3,)), Path("x"))
    made.folder.mkdir(parents=True)
    (made.folder / "config.json").write_text(json.dumps(made.config.resolve().to_dict()))
    config = parse_train(made.command()[3:])
    assert config == made.config.resolve()


def test_all_configurations_have_one_seed_before_one_has_two() -> None:
    study = Study({"a": Config(), "b": Config(attn=AttnConfig(kind="topk"))}, seeds=(3, 1))
    made = cells(study, Path("x"))
    assert [str(cell.folder) for cell in made] == ["x/a-seed3", "x/b-seed3", "x/a-seed1", "x/b-seed1"]
    assert [(c.name, c.config.train.seed, c.config.attn.kind) for c in made[1:3]] == [
        ("b", 3, "topk"),
        ("a", 1, "softmax"),
    ]
    assert {cell.config.wandb.group for cell in made} == {"x"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("study = 3", "define `study = Study"),
        ("1 / 0", "ZeroDivisionError"),
        ("from detr_fabric.study.settings import *\nstudy = Study({'a/b': Config()}, seeds=(1,))", "'a/b'"),
        ("from detr_fabric.study.settings import *\nstudy = Study({'a': Config()}, seeds=(1, 1))", "no seed twice"),
        (
            "from detr_fabric.study.settings import *\nfrom detr_fabric.config import *\n"
            "study = Study({'a': Config(attn=AttnConfig(kind='sparsmax'))}, seeds=(1,))",
            "mine.py: a: attn.kind is 'sparsmax'",
        ),
    ],
)
def test_a_mistake_in_a_study_file_is_one_sentence(source: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match="mine.py: ") as raised:
        load_study(str(tmp_path / "mine.py"))
    assert words in str(raised.value)
    with pytest.raises(UserError, match=r"absent\.py: no such file$"):
        load_study(str(tmp_path / "absent.py"))


def cell(folder: Path, stored: Config, *records: dict[str, float], **train: int) -> Cell:
    """A cell whose folder holds these records, of a run with the settings `stored`."""
    (folder / "config.json").write_text(json.dumps(stored.resolve().to_dict()))
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
    return Cell("a", Config(train=TrainConfig(**train)), folder)


def test_a_cell_is_done_when_it_was_evaluated_after_its_last_step(tmp_path: Path) -> None:
    assert final_records(Cell("a", Config(), tmp_path / "absent")) is None
    evaluated, trained = {"step": 4, "epoch": 2.0, "val/AP": 0.5}, {"step": 8, "epoch": 4.0, "train/loss": 1.0}
    for records, limits, done in (
        ((evaluated, trained), {"epochs": 4}, False),
        ((evaluated, trained), {"epochs": 2}, True),
        ((evaluated,), {"epochs": 2, "max_steps": 5}, False),
        ((evaluated,), {"epochs": 9, "max_steps": 4}, True),
        ((trained,), {"epochs": 4}, False),
    ):
        made = cell(tmp_path, Config(train=TrainConfig(**limits)), *records, **limits)
        assert final_records(made) == (list(records) if done else None)


def test_a_finished_run_of_other_settings_is_not_taken_for_the_cell(tmp_path: Path) -> None:
    free = Config(optim=OptimConfig(), train=TrainConfig(epochs=1, log_every=3))
    assert final_records(cell(tmp_path, free, {"step": 4, "epoch": 1.0, "val/AP": 0.5}, epochs=1)) is not None
    other = replace(free, optim=OptimConfig(lr=0.5))
    with pytest.raises(UserError, match=r"was run with optim.lr 0.5, which is 0.0001 in the study now; rename"):
        final_records(cell(tmp_path, other, {"step": 4, "epoch": 1.0, "val/AP": 0.5}, epochs=1))
    longer = replace(free, train=TrainConfig(epochs=4))  # as a run it could go on; as a result it is another one
    with pytest.raises(UserError, match="train.epochs 4, which is 1"):
        final_records(cell(tmp_path, longer, {"step": 4, "epoch": 4.0, "val/AP": 0.5}, epochs=1))
