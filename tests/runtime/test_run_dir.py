"""The folder of a run: whose it is, that nothing foreign is touched, and that two runs never share one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning_fabric import Fabric
from PIL import Image

from detr_fabric import build
from detr_fabric.config import Config, TrainConfig
from detr_fabric.errors import UserError
from detr_fabric.evaluate import __main__ as evaluate
from detr_fabric.export import __main__ as export
from detr_fabric.predict import __main__ as predict
from detr_fabric.runtime.checkpoint import save_checkpoint
from detr_fabric.runtime.files import check_outputs
from detr_fabric.runtime.launch import single_device
from detr_fabric.runtime.preemption import Preemption
from detr_fabric.runtime.run_dir import LOCK, RunLock, run_folder, take_folder
from tests import faults
from tests.commands import OFTEN, debug_job, steps
from tests.runtime.test_contents import Trainer


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return single_device("cpu", "32-true")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**train: str | None) -> Config:
    return Config(train=TrainConfig(**train))  # type: ignore[arg-type]


def test_runs_that_start_at_once_get_folders_of_their_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: run_folder(config(name="x")), range(24)))
    assert len(set(folders)) == 24 and all(folder.is_dir() for folder in folders)
    assert Path(f"runs/{date.today()}_x") in folders and Path(f"runs/{date.today()}_x-24") in folders


@pytest.mark.parametrize("name", ["lr[1e-4]", "**", "a*", "?", "[", "naïve ∆"])
def test_a_name_is_taken_as_it_is_written(name: str) -> None:
    first, second = run_folder(config(name=name)), run_folder(config(name=name))
    assert (first.name, second.name) == (f"{date.today()}_{name}", f"{date.today()}_{name}-2")


def test_names_that_no_folder_can_have_are_one_sentence(fabric: Fabric) -> None:
    with pytest.raises(UserError, match="File name too long; choose a shorter") as by_name:
        take_folder(fabric, config(name="x" * 300))
    with pytest.raises(UserError, match="File name too long; choose a shorter"):
        take_folder(fabric, config(run_dir="x" * 300))
    assert "\n" not in str(by_name.value)
    with pytest.raises(ValueError, match="train.run_dir is empty"):
        config(run_dir="")
    Path("file").touch()
    with pytest.raises(UserError, match="file"):
        take_folder(fabric, config(run_dir="file"))


def test_a_folder_of_somebody_else_is_refused_and_stays_as_it_is(home: Path, fabric: Fabric) -> None:
    foreign = {"notes.tmp": "notes", "preempted": "x", "config.json": '{"mine": 1}', "log.jsonl": "my log\n"}
    for name in foreign:
        folder = home / f"with {name}"
        folder.mkdir()
        (folder / name).write_text(foreign[name])
        with pytest.raises(UserError, match=f"holds '{name}' and is not the folder of a run.*--train.run-dir"):
            take_folder(fabric, config(run_dir=str(folder)))
        assert {file.name: file.read_text() for file in folder.iterdir()} == {name: foreign[name]}
    with pytest.raises(UserError, match="is not the folder of a run"):
        take_folder(fabric, config(resume="best.ckpt"))  # the folder that happens to hold the file


def test_in_a_folder_of_ours_only_what_runs_leave_behind_is_removed(home: Path, fabric: Fabric) -> None:
    (home / "run").mkdir()
    (home / "run" / "output.txt").write_text("what the shell wrote")
    _, first = take_folder(fabric, config(run_dir="run"))
    assert first is not None
    for name in ("last.ckpt.tmp", "log.jsonl.tmp", "preempted", "thesis.tmp", "notes.md"):
        (home / "run" / name).touch()
    RunLock(home / "run")  # of the same process, which may
    assert {file.name for file in (home / "run").iterdir()} == {LOCK, "output.txt", "thesis.tmp", "notes.md"}


def test_a_lock_finds_its_folder_under_another_name(home: Path) -> None:
    lock = RunLock(home / "a")
    assert lock.moved_to() is None
    os.rename("a", "b")
    assert lock.moved_to() == home / "b"
    (home / "a").mkdir()
    (home / "a" / LOCK).touch()  # another run takes the old name
    assert lock.moved_to() == home / "b"
    (home / "b" / LOCK).unlink()
    assert lock.moved_to() is None


# ---- no command replaces its own input


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_an_output_that_is_an_input_is_refused_under_every_name(
    link: Callable[[str, str], None] | None, home: Path
) -> None:
    Path("model.ckpt").write_text("weights")
    name = "model.ckpt" if link is None else "other"
    if link is not None:
        link("model.ckpt", name)
    with pytest.raises(UserError, match="--out .* would overwrite model.ckpt"):
        check_outputs(f"--out {name}", [Path("new"), Path(name)], [None, "absent", "model.ckpt"])
    check_outputs("--out new", [Path("new")], ["absent", "model.ckpt"])


@pytest.mark.parametrize("main", [evaluate.main, export.main, predict.main])
def test_commands_do_not_replace_the_checkpoint(
    main: Callable[[], None], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    (home / "out").mkdir()
    path = home / "out" / "predictions.json"
    trainer = Trainer(home)
    trainer.step()
    content = trainer.content()
    content["config"]["data"] |= {"root": None, "shapes_train": 1, "shapes_val": 1}
    save_checkpoint(path, content, keep_previous=False)
    before = path.read_bytes()
    Image.new("RGB", (40, 40)).save(home / "photo.jpg")
    out = [str(path)] if main is not predict.main else ["out", "photo.jpg"]
    monkeypatch.setattr(sys, "argv", ["command", str(path), "--out", *out])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "would overwrite" in said and said.count("\n") == 1, said
    assert path.read_bytes() == before


# ---- the order of starting


def test_the_lock_is_asked_before_the_checkpoint_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a start would miss what another one saves before it ends."""
    order: list[str] = []

    def step(name: str, result: object) -> Callable[..., object]:
        return lambda *_: order.append(name) or result

    data = SimpleNamespace(dataset=None)
    monkeypatch.setattr(build, "build_loaders", step("data", (data, data)))
    monkeypatch.setattr(build, "take_folder", step("lock", (Path("run"), None)))
    monkeypatch.setattr(build, "find_checkpoint", step("checkpoint", None))
    with pytest.raises(AttributeError):  # there are no data
        build.setup(config(accelerator="cpu"), Preemption())
    assert order == ["data", "lock", "checkpoint"]


# ---- while it runs


@pytest.mark.process
def test_a_folder_that_is_renamed_in_mid_run_is_noticed_and_keeps_everything(home: Path) -> None:
    going = debug_job(home, "x", *OFTEN, target=partial(faults.hold, 4))
    going.wait_until(faults.held(home, 4))
    os.rename("x", "y")
    faults.release(home, 4)
    assert going.wait() == [2], going.text()
    assert f"x was renamed to {home / 'y'} while the run wrote to it" in going.text(), going.text()
    assert going.text().count("error: ") == 1 and "Traceback" not in going.text()
    assert not (home / "x").exists()
    done = steps(home / "y")
    again = debug_job(home, "y", "--train.max-steps", str(done[-1] + 1))
    assert again.wait() == [0] and f"resumed at step {done[-1]}" in again.text(), again.text()
    assert steps(home / "y") == [*range(1, done[-1] + 2)]
    assert json.loads((home / "y" / "config.json").read_text())["train"]["run_dir"] == "y"
