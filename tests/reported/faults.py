"""Reported faults: what must be seen of each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from detr_fabric.config import Config, DataConfig
from detr_fabric.data.build import build_datasets
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.errors import UserError
from detr_fabric.runtime.checkpoint import load_checkpoint, save_checkpoint
from detr_fabric.runtime.resume import fingerprint
from tests import faults
from tests.coco_files import coco, image, thing, write_json
from tests.commands import Command, debug_job, records, steps
from tests.reported.runs import (
    ALLOWED,
    OFTEN,
    SMALL,
    at_once,
    base,
    command,
    end,
    evaluates_where_output_is,
    full_shared_memory,
    kill_before,
    kill_inside,
    run,
    see,
    write_data,
)

EVALUATE = ("-m", "detr_fabric.evaluate")


def crafted(at: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A folder with base's last checkpoint after a change; its checksums are right."""
    content = load_checkpoint(base(at) / "last.ckpt")
    change(content)
    content.pop("version", None)
    save_checkpoint(at / name / "last.ckpt", content)
    return at / name / "last.ckpt"


def heap_corruption(at: Path) -> None:
    args = ("--model.last-stage", "layer4", "--model.freeze")
    run(at, "moments", *args, "layer3", "--train.max-steps", "2")
    job = debug_job(at, "moments", *args, "layer2", "--train.max-steps", "4", ALLOWED)
    end(job, 2, 0)

    def shrink(content: dict[str, Any]) -> None:
        for state in content["optimizer"]["state"].values():
            state["exp_avg"] = torch.zeros(1)

    crafted(at, "shrunk", shrink)
    run(at, "shrunk", "--train.epochs", "3", code=2)


def resume_file_loses_progress(at: Path) -> None:
    run(at, "A", "--train.max-steps", "3")
    kill_before(at, "B", 12, "--train.resume", "A/last.ckpt")
    kill_before(at, "B", 14, "--train.resume", "A/last.ckpt")
    see(steps(at / "B") == list(range(4, 14)), f"steps {steps(at / 'B')}")
    see(load_checkpoint(at / "B" / "last.ckpt")["state"]["step"] == 13, "progress is lost")


def foreign_folder(at: Path) -> None:
    theirs = {"notes.tmp": "notes", "preempted": "x", "config.json": '{"mine":1}', "log.jsonl": "my log"}
    (at / "theirs").mkdir()
    for name, text in theirs.items():
        (at / "theirs" / name).write_text(text)
    run(at, "theirs", "--train.max-steps", "1", code=2)
    found = {file.name: file.read_text() for file in (at / "theirs").iterdir() if file.name in theirs}
    see(found == theirs, "files of the folder were deleted or replaced")
    (at / "work").mkdir()
    (at / "work" / "thesis.tmp").write_text("mine")
    args = ("-m", "detr_fabric.train", "--preset", "debug", "--train.max-steps", "1", "--train.run-dir", "")
    command(at / "work", *args, code=None)
    see((at / "work" / "thesis.tmp").exists(), "an empty --train.run-dir deletes files of the working folder")


def best_checkpoint_lost(at: Path) -> None:
    args = ("--train.max-steps", "8")
    kill_inside(at, "lost", *args, target=partial(faults.hang_in_save, 8, "second replace", True))
    run(at, "lost", *args)
    see((at / "lost" / "best.ckpt").exists(), "no best.ckpt")


def evaluation_recorded_twice(at: Path) -> None:
    for _ in range(3):
        kill_inside(at, "twice", target=partial(faults.hang_in_evaluation, 8, "recorded"))
    run(at, "twice")
    found = [record["step"] for record in records(at / "twice") if "val/AP" in record]
    see(found == [8, 16], f"evaluations of steps {found}")


def start_while_another_ends(at: Path) -> None:
    second = debug_job(at, "ends", target=faults.wait_in_setup)
    second.wait_until(faults.held(at, 0))
    run(at, "ends", "--train.max-steps", "6")
    faults.release(at, 0)
    text = end(second, 0, 2)
    see("resumed at step 6" in text or "error" in text, "it trained from scratch")
    see(steps(at / "ends")[:6] == list(range(1, 7)), f"steps {steps(at / 'ends')}")


def panel_ends_training(at: Path) -> None:
    root = write_data(at / "panel")
    Image.new("RGB", (8000, 4)).save(root / "val2017" / "0.png")
    content = coco([image(0, width=8000, height=4)], [thing(1, 0, box=[0, 0, 100, 4])])
    write_json(root / "annotations" / "instances_val2017.json", content)
    run(at, "panel-run", "--data.root", str(root), *SMALL)
    root = write_data(at / "surrogate", ("\ud800x", "dog"))
    job = debug_job(at, "surrogate-run", "--data.root", str(root), *SMALL)
    end(job, 0, 2)


def wandb_core_stopped(at: Path) -> None:
    job = debug_job(at, "core", "--wandb.mode", "offline", target=partial(faults.hold, 3))
    job.wait_until(faults.held(at, 3))
    core = [pid for pid in descendants(job.processes[0].pid) if b"wandb-core" in read(pid, "cmdline")]
    see(core, "wandb-core was not found")
    for pid in core:
        os.kill(pid, signal.SIGSTOP)
    try:
        faults.release(at, 3)
        end(job, 0, timeout=120)
    finally:
        for pid in core:
            os.kill(pid, signal.SIGKILL)


def read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def descendants(parent: int) -> list[int]:
    parents = {
        int(folder.name): int(read(int(folder.name), "stat").rpartition(b")")[2].split()[1] or 0)
        for folder in Path("/proc").glob("[0-9]*")
        if read(int(folder.name), "stat")
    }
    children = [pid for pid, of in parents.items() if of == parent]
    return [*children, *(pid for child in children for pid in descendants(child))]


def out_replaces_checkpoint(at: Path) -> None:
    base(at)
    file = at / "out.ckpt"
    shutil.copyfile(at / "base" / "last.ckpt", file)
    before = file.read_bytes()
    command(at, *EVALUATE, "out.ckpt", "--out", "out.ckpt", code=2)
    command(at, "-m", "detr_fabric.export", "out.ckpt", "--format", "torch", "--out", "out.ckpt", code=2)
    see(file.read_bytes() == before, "the checkpoint was replaced")


def resume_best_cuts_log(at: Path) -> None:
    run(at, "r", "--train.epochs", "3")
    args = ("--preset", "debug", "--train.log-every", "1", "--train.resume", "r/best.ckpt", "--train.max-steps", "9")
    text = command(at, "-m", "detr_fabric.train", *args, "--train.run-dir", "r")
    kept = [*(at / "r").glob("*.jsonl"), *(at / "r").glob("*.ckpt")]
    see("going back from step 24" in text, "going back is not said")
    see(any("24" in file.name for file in kept), "what came later is not kept")


def full_shared_memory_and_few_files(at: Path) -> None:
    full_shared_memory(at)
    job = debug_job(at, "files", "--data.workers", "2", target=partial(faults.few_files, 22))
    see("ulimit -n" in end(job, 2, timeout=60), "the cure is not named")


def fifo_and_devzero(at: Path) -> None:
    special: dict[str, Callable[[Path], object]] = {
        "fifo": os.mkfifo,
        "zero": lambda file: file.symlink_to("/dev/zero"),
    }
    for name, make in special.items():
        root = write_data(at / name)
        for split in ("train2017", "val2017"):
            (root / split / "3.png").unlink()
            make(root / split / "3.png")
        for workers in ("0", "2"):
            args = ("--data.root", str(root), *SMALL, "--data.workers", workers)
            text = run(at, f"{name}{workers}", *args, code=2, timeout=60)
            see("3.png is a folder or a device" in text, "the file is not named")
        run(at, f"{name}-skip", "--data.root", str(root), *SMALL, "--data.bad-images", "skip", timeout=90)
        (root / "val2017" / "labels").mkdir()
        (root / "val2017" / "data.yaml").write_text("train: .\nval: .\nnames: [cat]\n")
        with contextlib.suppress(UserError):
            read_annotations(root / "val2017" / "data.yaml")
    text = command(at, "-m", "detr_fabric.predict", "fifo-skip/last.ckpt", "fifo/val2017", timeout=60)
    see("3.png is a folder or a device" in text, "predict does not name the file")
    text = command(at, *EVALUATE, "fifo-skip/last.ckpt", "--data.bad-images", "stop", code=2, timeout=60)
    see("3.png is a folder or a device" in text, "evaluate does not name the file")


def names(at: Path) -> None:
    train = ("-m", "detr_fabric.train", "--preset", "debug", "--train.max-steps", "1")
    (at / "names").mkdir()
    for _ in range(2):
        command(at / "names", *train, "--train.name", "lr[1e-4]")
    see(len(list((at / "names" / "runs").iterdir())) == 2, "the second run gets no folder of its own")
    command(at / "names", *train, "--train.name", "**", code=None)
    command(at / "names", *train, "--train.run-dir", 300 * "x", code=None)


def terminal_escapes(at: Path) -> None:
    root = write_data(at / "escapes", ("\x1b[2J\x1b]0;pwned\x07", "dog"))
    text = run(at, "escaped", "--data.root", str(root), *SMALL)
    text += command(at, *EVALUATE, "escaped/last.ckpt", "--confusion", "0.5")
    file = root / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text().replace('"4.png"', '"4\\u001b[31m\\nX.jpg"'))
    text += run(at, "escaped-file", "--data.root", str(root), *SMALL, code=2)
    see("\x1b" not in text, "escape sequences reach the terminal")


def checkpoint_contents(at: Path) -> None:
    def item(*keys: str, value: object = None) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            for key in keys[:-1]:
                content = content[key]
            if value is None:
                del content[keys[-1]]
            else:
                content[keys[-1]] = value

        return change

    first = next(iter(load_checkpoint(base(at) / "last.ckpt")["model"]))
    changes = {
        "no state": item("state"),
        "no fingerprint": item("fingerprint"),
        "no steps_per_epoch": item("steps_per_epoch"),
        "step": item("state", "step", value="three"),
        "model": item("model", value=["weights"]),
        "weight": item("model", first, value="weight"),
        "meta": item("model", first, value=torch.zeros(3, device="meta")),
        "sparse": item("model", first, value=torch.zeros(3).to_sparse()),
        "optimizer": item("optimizer", value="adam"),
        "global_batch": item("global_batch", value="eight"),
        "categories": item("categories", value="cat"),
        "backbone": item("config", "model", "backbone", value="vit_b_16"),
        "kind": item("config", "attn", "kind", value="unheard of"),
        "config": item("config", value=[1]),
    }
    bad = []
    for name, change in changes.items():
        crafted(at, f"content {name}", change)
        try:
            run(at, f"content {name}", "--train.epochs", "3", code=2)
        except AssertionError as error:
            bad.append(f"{name} ({error})")
    see(not bad, "; ".join(bad))
    for name in ("config", "meta"):
        command(at, "-m", "detr_fabric.predict", f"content {name}/last.ckpt", "cache", code=2)


def orphans_of_torchrun(at: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "detr_fabric.train")
    args = ("--preset", "debug", "--train.epochs", "400", "--train.log-every", "1", "--train.run-dir", "orphans")
    going = Command(*launcher, *args, cwd=at, XDG_CACHE_HOME=str(at / "cache"))
    try:
        going.wait_until(lambda: steps(at / "orphans"))
        going.process.kill()
        going.process.wait()
        try:
            faults.until(lambda: not going.family(), 40)
        except AssertionError:
            see(False, f"{len(going.family())} processes live 40 s after their launcher")
    finally:
        going.kill()


def small(at: Path) -> None:
    (at / "small" / "images").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(at / "small" / "images" / "1.png")
    text = f"train: images\nval: images\nnames: [0x{5000 * 'f'}]\n"
    (at / "small" / "data.yaml").write_text(text)
    with contextlib.suppress(UserError):
        build_datasets(Config(data=DataConfig(root=str(at / "small"))).resolve().data, 0)
    evaluates_where_output_is(at, "ascii")
    for flags in (("--data.pad-multiple", "1000000"), ("--loss.eos-coef", "1e308")):
        end(debug_job(at, flags[0], *flags, "--train.max-steps", "1"), 2, 1, 0, 3, 4)


def silent_changes(at: Path) -> None:
    run(at, "silent", "--train.max-steps", "2")
    run(at, "silent", "--train.max-steps", "4", "--data.max-batch-pixels", "17000", code=2)
    content = coco()
    prints = set()
    for name, changed in (
        ("a", content),
        ("b", coco(annotations=[row | {"iscrowd": int(row["id"] == 1)} for row in content["annotations"]])),
        ("c", coco(images=[image(1, file_name="2.png"), image(2, file_name="1.png")])),
    ):
        prints.add(fingerprint(read_annotations(write_json(at / "silent-data" / f"{name}.json", changed))))
    see(len(prints) == 3, "crowds or file names are not part of the fingerprint")


def folder_renamed(at: Path) -> None:
    job = debug_job(at, "renamed", *OFTEN, target=partial(faults.hold, 4))
    job.wait_until(faults.held(at, 4))
    (at / "renamed").rename(at / "other")
    faults.release(at, 4)
    text = end(job, 0, 2)
    see(any(word in text for word in ("renamed", "moved", "removed")), "nothing is said")
    see(steps(at / "renamed" if (at / "renamed").exists() else at / "other"), "a folder without a log")


def no_best_without_objects(at: Path) -> None:
    root = write_data(at / "empty", val_objects=False)
    run(at, "no-objects", "--data.root", str(root), *SMALL)
    see((at / "no-objects" / "best.ckpt").exists(), "no best.ckpt")


def checkpoint_chooses(at: Path) -> None:
    def elsewhere(content: dict[str, Any]) -> None:
        content["config"]["data"]["shapes_dir"] = str(at / "chosen")

    file = crafted(at, "chooses", elsewhere)
    command(at, *EVALUATE, str(file), code=None)
    see(not (at / "chosen").exists(), "evaluate wrote where the checkpoint told it")


CASES: dict[str, Callable[[Path], object]] = {
    "01_heap_corruption_moments": heap_corruption,
    "02_resume_file_loses_progress": resume_file_loses_progress,
    "03_foreign_folder": foreign_folder,
    "04_best_checkpoint_lost": best_checkpoint_lost,
    "05_evaluation_recorded_twice": evaluation_recorded_twice,
    "06_start_while_another_ends": start_while_another_ends,
    "07_starts_at_once_without_run_dir": at_once,
    "08_panel_ends_training": panel_ends_training,
    "09_wandb_core_stopped": wandb_core_stopped,
    "10_out_replaces_checkpoint": out_replaces_checkpoint,
    "11_resume_best_cuts_log": resume_best_cuts_log,
    "12_shm_full_hangs": full_shared_memory_and_few_files,
    "13_fifo_devzero": fifo_and_devzero,
    "14_names": names,
    "15_terminal_escapes": terminal_escapes,
    "16_checkpoint_contents": checkpoint_contents,
    "17_orphans_of_torchrun": orphans_of_torchrun,
    "18_small": small,
    "19_silent_changes_at_resume": silent_changes,
    "20_folder_renamed_while_running": folder_renamed,
    "21_no_best_without_objects": no_best_without_objects,
    "22_checkpoint_chooses_where_evaluate_writes": checkpoint_chooses,
}
