"""Which checkpoint a run goes on from, what may have changed since, and what is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detr_fabric.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, changes_results
from detr_fabric.data.formats.annotations import Annotations, read_annotations
from detr_fabric.data.sampler import Shard
from detr_fabric.errors import UserError
from detr_fabric.runtime.checkpoint import load_checkpoint, save_checkpoint
from detr_fabric.runtime.resume import Checkpoint, find_checkpoint, fingerprint, restore_state
from tests.checkpoints import stored
from tests.coco_files import coco, thing, write_json


def write(path: Path, step: int, **state: Any) -> Path:
    save_checkpoint(path, stored(step, **state))
    return path


def found(folder: Path, resume: Path | str | None = None) -> tuple[Checkpoint | None, list[str]]:
    notes: list[str] = []
    config = Config(train=TrainConfig(resume=None if resume is None else str(resume)))
    return find_checkpoint(config, folder, True, notes), notes


def test_a_new_folder_has_nothing_to_go_on_from_and_auto_says_so(tmp_path: Path) -> None:
    assert found(tmp_path / "new") == (None, [])
    with pytest.raises(UserError, match="--train.resume auto.*last.ckpt does not exist"):
        found(tmp_path / "new", "auto")


def test_a_named_file_is_where_a_new_folder_starts_and_then_the_folders_own_checkpoint_wins(tmp_path: Path) -> None:
    file = write(tmp_path / "a" / "last.ckpt", 3)
    start, _ = found(tmp_path / "b", file)
    assert start is not None and start.fork and start.path == file
    write(tmp_path / "b" / "last.ckpt", 11, origin=str(file))
    again, notes = found(tmp_path / "b", file)
    assert again is not None and again.content["state"]["step"] == 11 and not again.fork and notes == []
    other = write(tmp_path / "c" / "last.ckpt", 5)
    kept, (note,) = found(tmp_path / "b", other)
    assert kept is not None and kept.content["state"]["step"] == 11 and f"{other} is not read" in note


def test_a_damaged_last_checkpoint_gives_way_to_the_previous_one(tmp_path: Path) -> None:
    write(tmp_path / "last.ckpt", 1)
    write(tmp_path / "last.ckpt", 2)
    (tmp_path / "last.ckpt").write_bytes(b"PK")
    start, (note,) = found(tmp_path)
    assert start is not None and start.path.name == "previous.ckpt" and "previous.ckpt" in note


def test_going_back_inside_a_folder_keeps_what_came_later_and_happens_once(tmp_path: Path) -> None:
    best = write(tmp_path / "best.ckpt", 8)
    write(tmp_path / "last.ckpt", 24)
    (tmp_path / "log.jsonl").write_text('{"step": 24}\n')
    start, (note,) = found(tmp_path, best)
    assert start is not None and start.path == best and not start.fork and "from step 24 to 8" in note
    assert load_checkpoint(tmp_path / "before_going_back_24.ckpt")["state"]["step"] == 24
    assert (tmp_path / "before_going_back_24.jsonl").read_text() == '{"step": 24}\n'
    write(tmp_path / "last.ckpt", 12, origin=str(best))  # killed later, and the same command again
    again, notes = found(tmp_path, best)
    assert again is not None and again.content["state"]["step"] == 12 and notes == []


@pytest.mark.parametrize(
    ("name", "norm", "schedule", "matters"),
    [
        ("optim.lr", "frozen", "step", True),
        ("optim.ema", "frozen", "step", True),  # not what is learned, but what is evaluated and taken for best
        ("attn.kind", "frozen", "step", True),
        ("data.workers", "batch", "one-cycle", False),
        ("wandb.project", "frozen", "step", False),
        ("train.epochs", "frozen", "step", False),
        ("train.epochs", "frozen", "one-cycle", True),
        ("train.batch_size", "frozen", "step", False),
        ("train.accumulate", "batch", "step", True),
        ("data.max_batch_pixels", "batch", "step", True),
        ("data.max_batch_pixels", "frozen", "step", False),
    ],
)
def test_a_setting_matters_unless_it_is_declared_free(name: str, norm: Any, schedule: Any, matters: bool) -> None:
    config = Config(model=ModelConfig(norm=norm), optim=OptimConfig(schedule=schedule))
    assert changes_results(name, config) == matters


def annotations(folder: Path, **changes: Any) -> Annotations:
    content = coco()
    content["annotations"] = [thing(1, 1, **changes), thing(2, 2, category=2)]
    return read_annotations(write_json(folder / "a.json", content))


def test_a_fingerprint_sees_boxes_crowds_file_names_and_which_images_are_turned(tmp_path: Path) -> None:
    before = annotations(tmp_path)
    renamed = coco()
    renamed["annotations"] = [thing(1, 1), thing(2, 2, category=2)]
    renamed["images"][0]["file_name"] = "other.png"
    others = [
        annotations(tmp_path, box=(11, 5, 20, 10)),
        annotations(tmp_path, iscrowd=1),
        read_annotations(write_json(tmp_path / "b.json", renamed)),
    ]
    turned = before.turned.copy()
    turned[0] = True
    others.append(replace(before, turned=turned))
    assert len({fingerprint(each) for each in (before, *others)}) == 5
    assert fingerprint(annotations(tmp_path)) == fingerprint(before)


def restored(
    tmp_path: Path, state: dict[str, Any], augment: str = "original", digest: str | None = None, **changes: Any
) -> tuple[Any, list[str]]:
    """The State that goes on from a checkpoint of 8 images a step and 10 steps an epoch, augmented by a.py where the
    checkpoint has a digest. augment, digest: the augmentation now."""
    data = annotations(tmp_path)
    before = "a.py" if "augment" in changes.get("content", {}) else "original"
    config = Config(data=DataConfig(augment=before)).resolve()
    content = {
        "state": state,
        "config": config.to_dict(),
        "categories": data.categories.to_dict(),
        "fingerprint": fingerprint(data),
        "world_size": 1,
        "global_batch": 8,
        "steps_per_epoch": 10,
        **changes.pop("content", {}),
    }
    dataset = SimpleNamespace(augment=None if digest is None else SimpleNamespace(digest=digest))
    loader = SimpleNamespace(dataset=dataset, shard=Shard(0, 1), global_batch=8, steps_per_epoch=10)
    loader.__dict__.update(changes.pop("loader", {}))
    notes: list[str] = []
    checkpoint = Checkpoint(tmp_path / "x.ckpt", content, changes.pop("fork", False))
    cfg = replace(config, data=replace(config.data, augment=augment), train=replace(config.train, **changes))
    return restore_state(checkpoint, cfg, data, loader, notes), notes  # type: ignore[arg-type]


def test_a_fork_is_another_run(tmp_path: Path) -> None:
    before = {"epoch": 1, "step": 13, "step_in_epoch": 3, "best_ap": 0.4, "wandb_run_id": "abc"}
    state, notes = restored(tmp_path, before, fork=True, resume=str(tmp_path / "x.ckpt"))
    assert (state.step, state.best_ap, state.wandb_run_id) == (13, -1.0, None)
    assert state.origin == str(tmp_path / "x.ckpt") and any("a run of its own" in note for note in notes)
    same, _ = restored(tmp_path, before)
    assert (same.best_ap, same.wandb_run_id, same.origin) == (0.4, "abc", None)


def test_another_number_of_images_a_step_goes_on_from_the_start_of_the_epoch_if_allowed(tmp_path: Path) -> None:
    before = {"epoch": 2, "step": 23, "step_in_epoch": 3}
    wider = {"loader": {"shard": Shard(0, 2), "global_batch": 16, "steps_per_epoch": 5}}
    with pytest.raises(UserError, match="a step had 8 images and now has 16.*--train.allow-config-change"):
        restored(tmp_path, before, **wider)
    state, notes = restored(tmp_path, before, **wider, allow_config_change=True)
    assert (state.epoch, state.step, state.step_in_epoch) == (2, 23, 0)
    assert "from the start of epoch 3" in notes[-1]
    done, _ = restored(tmp_path, before | {"step_in_epoch": 10}, **wider, allow_config_change=True)
    assert done.step_in_epoch == 5  # an epoch that was finished stays finished


def test_settings_and_data_that_differ_are_named_and_refused(tmp_path: Path) -> None:
    changed = Config().resolve().to_dict()
    changed["optim"]["lr"] = 3e-4
    with pytest.raises(UserError, match="--optim.lr was 0.0003 and is now 0.0001"):
        restored(tmp_path, {}, content={"config": changed})
    swapped = annotations(tmp_path).categories.to_dict()
    swapped["names"].reverse()
    with pytest.raises(UserError, match="the classes were (.*), (.*) and are now \\2, \\1"):
        restored(tmp_path, {}, content={"categories": swapped})
    with pytest.raises(UserError, match="the training data have changed"):
        restored(tmp_path, {}, content={"fingerprint": "another"})


def test_another_augmentation_is_refused_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    stored_one = {"content": {"augment": "1"}}
    for changes, words in (
        ({"augment": "a.py", "digest": "2", **stored_one}, "a.py has another content"),
        ({"augment": "b.py", "digest": "2", **stored_one}, "--data.augment was a.py and is now b.py"),
        ({"augment": "b.py", "digest": "2"}, "--data.augment was original and is now b.py"),
        (stored_one, "--data.augment was a.py and is now original"),
    ):
        with pytest.raises(UserError, match=words):
            restored(tmp_path, {}, **changes)  # type: ignore[arg-type]
        restored(tmp_path, {}, **changes, allow_config_change=True)  # type: ignore[arg-type]
    _, (note,) = restored(tmp_path, {}, augment="copy_of_a.py", digest="1", **stored_one)
    assert note == "resume  data.augment: a.py -> copy_of_a.py"


def test_every_name_of_a_checkpoint_exists_before_the_checkpoint_that_knows_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"model": {}, "config": {}, "categories": {}, "state": {"step": 1}}
    save_checkpoint(tmp_path / "last.ckpt", content)
    order: list[str] = []
    replace_file = __import__("os").replace
    monkeypatch.setattr("os.replace", lambda a, b: order.append(Path(b).name) or replace_file(a, b))
    save_checkpoint(tmp_path / "last.ckpt", content | {"state": {"step": 2}}, names=["best.ckpt", "epoch_0001.ckpt"])
    assert order == ["best.ckpt", "epoch_0001.ckpt", "last.ckpt", "previous.ckpt"]
    assert load_checkpoint(tmp_path / "best.ckpt")["state"]["step"] == 2
