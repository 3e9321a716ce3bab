"""Files of weights: official ones load, damaged and hostile ones are refused."""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detr_fabric import replay
from detr_fabric.config import Config
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.errors import UserError
from detr_fabric.evaluate import __main__ as evaluate
from detr_fabric.model.backbone import Backbone
from detr_fabric.model.pretrained import load_backbone_weights
from detr_fabric.predict import __main__ as predict
from detr_fabric.runtime.checkpoint import (
    load_checkpoint,
    load_model_state,
    read_torch_file,
    read_weights,
    save_checkpoint,
)
from detr_fabric.runtime.finetune import load_weights
from detr_fabric.runtime.resume import find_checkpoint
from tests.checkpoints import stored
from tests.model.test_detr import small_detr
from tests.patching import Patch

CONTENT = {"model": {"w": torch.arange(10000.0)}, "config": {}, "categories": {}}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A file as the original's training writes it, its command line included."""
    torch.manual_seed(9)
    model = small_detr()
    for p in model.parameters():
        p.data.normal_()
    path = tmp_path / "official.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-4), "epoch": 499}, path)
    return path


def test_an_official_file_is_read_with_its_command_line_inside(official: Path) -> None:
    _, state = read_weights(str(official))
    for name, value in torch.load(official, weights_only=False)["model"].items():
        assert torch.equal(state[name], value), name


@pytest.fixture
def server(official: Path) -> Iterator[str]:
    """Serves the folder of the official file on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(official.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_url_is_downloaded_once_and_checked_by_the_hash_in_its_name(
    official: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(official.parent / "home"))
    right = official.with_name(f"detr-{hashlib.sha256(official.read_bytes()).hexdigest()[:8]}.pth")
    wrong = official.with_name("detr-00000000.pth")
    os.link(official, wrong)
    os.link(official, right)
    read_weights(f"{server}/{right.name}")
    right.unlink()
    read_weights(f"{server}/{right.name}")
    with pytest.raises(UserError, match="hash"):
        read_weights(f"{server}/{wrong.name}")
    with pytest.raises(UserError, match="give its path"):
        read_weights(f"{server}/nothing.pth")
    assert [p.name for p in (official.parent / "home").rglob("*.pth")] == [right.name]


def test_a_checkpoint_comes_back_as_it_was_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {**CONTENT, "step": 1})
    save_checkpoint(path, {**CONTENT, "step": 2})
    content = load_checkpoint(path)
    assert content["step"] == 2 and torch.equal(content["model"]["w"], CONTENT["model"]["w"])


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_bit_is_noticed(place: float, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, CONTENT)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="last.ckpt"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"<html>", b"hi", b"PK\x03\x04 and then nothing"])
def test_what_is_no_checkpoint_is_refused_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="last.ckpt") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not re.search(r"\(\d+\)", str(caught.value))  # of b"hi" pickle says "105"
    with pytest.raises(UserError, match="no such file"):
        load_checkpoint(tmp_path / "nothing.ckpt")
    with pytest.raises(UserError, match="a folder without config.json: give a .ckpt file"):
        load_checkpoint(tmp_path)
    (tmp_path / "best.ckpt").touch()
    with pytest.raises(UserError, match=r"a folder without config.json: give .*/best\.ckpt, or"):
        load_checkpoint(tmp_path)


def test_a_truncated_checkpoint_and_one_of_another_program_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, CONTENT)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError):
        load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="not a checkpoint of detr_fabric"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_version_or_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({**CONTENT, "version": 7}, path)
    with pytest.raises(UserError, match="last.ckpt: written by version 7 of the format, this package reads 1"):
        load_checkpoint(path)
    model = small_detr()
    state = {
        name: value[..., :1] if name == "query_embed.weight" else value for name, value in model.state_dict().items()
    }
    del state["class_embed.bias"]
    with pytest.raises(
        UserError, match=r"last.ckpt: does not fit this model: 1 tensors missing, 0 unknown, 1 of"
    ) as said:
        load_model_state(model, {**state}, str(path))
    assert "query_embed.weight" in str(said.value) and "\n" not in str(said.value)


class Hostile:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("forced", ["0", "1"])
def test_code_inside_a_checkpoint_is_never_run(forced: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    torch.save({"model": Hostile(tmp_path / "proof")}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match="can't be read"):
        read_torch_file(tmp_path / "hostile.pth")
    with pytest.raises(UserError, match="hostile.pth"):
        read_weights(str(tmp_path / "hostile.pth"))
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("hostile", [("last.ckpt",), ("last.ckpt", "previous.ckpt")])
def test_a_hostile_last_checkpoint_gives_way_to_the_previous_one_without_running(
    hostile: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for name in ("last.ckpt", "previous.ckpt"):
        bad = {**CONTENT, "state": Hostile(tmp_path / "proof"), "version": 1}
        good = {**stored(), "model": CONTENT["model"]}
        torch.save(bad, tmp_path / name) if name in hostile else save_checkpoint(tmp_path / name, good)
    notes: list[str] = []
    if len(hostile) == 1:
        found = find_checkpoint(Config(), tmp_path, True, notes)
        assert found is not None
        source, content = found.path, found.content
        assert source.name == "previous.ckpt" and torch.equal(content["model"]["w"], CONTENT["model"]["w"])
        assert "last.ckpt: can't be read" in notes[0] and "going on from previous.ckpt" in notes[0]
    else:
        with pytest.raises(UserError, match="previous.ckpt: can't be read"):
            find_checkpoint(Config(), tmp_path, True, notes)
    assert not (tmp_path / "proof").exists()


def test_code_inside_any_other_file_that_is_read_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights to start from, a backbone, a step saved for replay, annotations, a checkpoint to evaluate or predict."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)
    entry = Hostile(tmp_path / "proof")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    zipped, plain = tmp_path / "zipped.pth", tmp_path / "plain.pth"
    torch.save({**CONTENT, "version": 1, "micro_batches": entry, "layer1.0.conv1.weight": entry}, zipped)
    plain.write_bytes(pickle.dumps(entry, protocol=2))
    readers: dict[str, Callable[[str], object]] = {
        "weights": lambda file: load_weights(small_detr(), file, Categories((1,), ("cat",))),
        "backbone": lambda file: load_backbone_weights(Backbone("resnet18").body, "resnet18", file),
        "annotations": lambda file: read_annotations(Path(file)),
    }
    for file in (str(zipped), str(plain)):
        for name, reader in readers.items():
            with pytest.raises(UserError, match="zipped|plain") as refused:
                reader(file)
            assert "\n" not in str(refused.value), name
        for main, args in ((replay.main, [file]), (evaluate.main, [file]), (predict.main, [file, "."])):
            monkeypatch.setattr("sys.argv", ["program", *args])
            with pytest.raises(SystemExit) as ended:
                main()
            said = capsys.readouterr().err
            assert ended.value.code == 2 and said.count("\n") == 1 and Path(file).name in said
    assert not (tmp_path / "proof").exists()
    pickle.loads(plain.read_bytes())
    assert (tmp_path / "proof").exists(), "these files are harmless"


def test_two_different_complete_checkpoints_exist_at_every_moment(tmp_path: Path, patch: Patch) -> None:
    """The folder is looked at before and after every system call that changes a name."""
    last, seen = tmp_path / "last.ckpt", []
    content = {"model": {"w": torch.ones(3)}, "config": {}, "categories": {}}

    def valid() -> set[int]:
        found = set()
        for name in ("last.ckpt", "previous.ckpt"):
            if (tmp_path / name).exists():
                found.add(load_checkpoint(tmp_path / name)["step"])
        return found

    for name in ("replace", "link", "fsync"):
        original = getattr(os, name)

        def watched(*args: Any, original: Any = original) -> None:
            seen.append(valid())
            original(*args)
            seen.append(valid())

        patch(os, name, watched)
    for step in range(4):
        save_checkpoint(last, {**content, "step": step})
        if step == 1:
            seen.clear()
    assert len(seen) > 8 and all(len(found) == 2 for found in seen)
    assert valid() == {3, 2} and {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}
