"""Training as a user starts it: one process or two, from start to finish, interrupted, and with mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric

from detr_fabric.config import OptimConfig
from detr_fabric.data.batch import MicroBatch, Target, pad_images
from detr_fabric.loop import training_step
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.model.detr import DETR
from detr_fabric.optimizer import build_optimizer, build_scheduler
from detr_fabric.presets import load_preset
from detr_fabric.runtime.preemption import Preemption
from detr_fabric.runtime.run import State
from detr_fabric.tracking import recorder
from tests.coco_files import coco, write_root
from tests.commands import Job, python, records, torchrun, train
from tests.model.test_detr import small_detr
from tests.offline_wandb import read_run
from tests.patching import patch

DEBUG = ("--preset", "debug")
EXACT = ("--model.dropout", "0", "--model.norm", "frozen", "--train.max-steps", "4", "--train.log-every", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with one finished run of the debug preset, "first"."""
    folder = tmp_path_factory.mktemp("user")
    done = train(*DEBUG, "--train.run-dir", "first", cwd=folder, XDG_CACHE_HOME=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    (folder / "first.txt").write_text(done.stdout)
    return folder


def job(folder: Path, *args: str) -> Job:
    return Job(*args, cwd=folder, XDG_CACHE_HOME=str(folder / "cache"))


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["model"]


def test_a_run_says_what_it_does_and_leaves_its_records(folder: Path) -> None:
    said = (folder / "first.txt").read_text()
    assert "built-in synthetic shapes" in said and "trained batch norm" in said and "AP50" in said
    run = folder / "first"
    written = ("config.json", "log.jsonl", "starts.jsonl", "last.ckpt", "best.ckpt", "evaluation.json", "panel.png")
    for name in (*written, "report.html"):
        assert (run / name).stat().st_size > 0, name
    steps = [record["step"] for record in records(run) if "train/loss" in record]
    assert steps == list(range(2, 17, 2))
    every_step = job(
        folder,
        *DEBUG,
        "--train.run-dir",
        "every",
        "--train.log-every",
        "1",
        "--train.max-steps",
        "4",
        *("--train.report", "none"),
    )
    assert every_step.wait() == [0] and not (folder / "every" / "report.html").exists(), every_step.text()
    single = [record["train/loss"] for record in records(folder / "every") if "train/loss" in record]
    logged = [record["train/loss"] for record in records(run) if "train/loss" in record]
    assert logged[:2] == pytest.approx([sum(single[:2]) / 2, sum(single[2:]) / 2], rel=1e-6)  # means since the last
    record = records(run)[0]
    raw = {name: record[f"train/{name}"] for name in ("loss_ce", "loss_ce_0", "loss_bbox", "loss_bbox_0", "loss_giou")}
    assert record["train/weighted/loss_bbox_0"] == pytest.approx(5 * raw["loss_bbox_0"])
    weighted = [value for name, value in record.items() if name.startswith("train/weighted/")]
    assert len(weighted) == 6 and sum(weighted) == pytest.approx(record["train/loss"], rel=1e-5)
    for name in ("lr/transformer", "lr/backbone", "grad_norm", "images_per_second", "data_wait", "memory_gb", "epoch"):
        assert record[name] >= 0
    assert {
        f"val/{name}" for name in ("AP", "AP50", "AR100", "AP_class/triangle", "loss", "loss_ce_0", "class_error")
    } <= set(records(run)[-1])


def test_evaluate_needs_only_the_checkpoint_and_agrees_with_training(folder: Path) -> None:
    args = ("-m", "detr_fabric.evaluate", "first/last.ckpt", "--out", "scores.json", "--eval.backend", "pycocotools")
    done = python(*args, cwd=folder, XDG_CACHE_HOME=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    again = json.loads((folder / "scores.json").read_text())
    before = json.loads((folder / "first" / "evaluation.json").read_text())
    assert again["tide"]["counts"] == before["tide"]["counts"]  # of the last evaluation
    assert again["AP_class"].keys() == before["AP_class"].keys() == {"rectangle", "ellipse", "triangle"}
    for name in ("AP", "AP50", "AR100", "ARs"):
        assert again[name] == pytest.approx(before[name], abs=1e-9)


def test_a_run_resumed_inside_an_epoch_equals_one_that_never_stopped(folder: Path) -> None:
    cut = (*DEBUG, "--train.run-dir", "cut")
    stopped = job(folder, *cut, "--train.max-steps", "5")
    assert stopped.wait() == [0], stopped.text()
    resumed = job(folder, *cut, "--data.workers", "2", "--train.resume", "auto")
    assert resumed.wait() == [0] and "resumed at step 5" in resumed.text(), resumed.text()
    starts = [json.loads(line)["step"] for line in (folder / "cut" / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 5] and "resumed" in (folder / "cut" / "report.html").read_text()
    once, twice = weights(folder / "first" / "last.ckpt"), weights(folder / "cut" / "last.ckpt")
    assert all(torch.equal(once[name], twice[name]) for name in once)
    losses = [
        {r["step"]: r["train/loss"] for r in records(folder / run) if "train/loss" in r} for run in ("first", "cut")
    ]
    assert losses[0].items() <= losses[1].items()
    over = job(folder, *cut)
    assert over.wait() == [2] and "nothing is left" in over.text() and "Traceback" not in over.text()


def test_two_processes_train_like_one_with_twice_the_batch(folder: Path) -> None:
    cache = str(folder / "cache")
    one = job(folder, *DEBUG, *EXACT, "--train.run-dir", "one", "--train.batch-size", "8")
    assert one.wait() == [0], one.text()
    args = (*DEBUG, *EXACT, "--train.batch-size", "4")
    two = torchrun(2, *args, "--train.run-dir", "two", cwd=folder, XDG_CACHE_HOME=cache)
    own = train(*args, "--train.devices", "2", "--train.run-dir", "own", cwd=folder, XDG_CACHE_HOME=cache)
    for done in (two, own):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("built-in synthetic shapes") == 1
    reference = weights(folder / "one" / "last.ckpt")
    for run in ("two", "own"):
        for name, value in weights(folder / run / "last.ckpt").items():
            torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-5, msg=f"{run} {name}")
        losses = [[r["train/loss"] for r in records(folder / r_) if "train/loss" in r] for r_ in ("one", run)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        scores = [json.loads((folder / r_ / "evaluation.json").read_text()) for r_ in ("one", run)]
        assert scores[1]["AR100"] == pytest.approx(scores[0]["AR100"], abs=1e-3)


def test_a_loss_that_is_not_finite_stops_all_ranks_with_one_message(folder: Path) -> None:
    args = (
        *DEBUG,
        "--optim.lr",
        "1e30",
        "--optim.clip-max-norm",
        "0",
        "--train.batch-size",
        "4",
        "--train.run-dir",
        "nan",
    )
    done = torchrun(2, *args, cwd=folder, XDG_CACHE_HOME=str(folder / "cache"))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "step 2" in said[0] and "images" in said[0] and "--optim.lr" in said[0]
    numbers = said[0].split("images ")[1].split(";")[0].split(", ")
    assert len(numbers) == len(set(numbers)) == 8 and all(number.isdigit() for number in numbers)
    assert not (folder / "nan" / "last.ckpt").exists()


def test_bad_data_is_one_sentence_and_no_run_folder(folder: Path) -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "val2017").mkdir(exist_ok=True)
    (folder / "train2017").mkdir(exist_ok=True)
    (folder / "annotations" / "instances_train2017.json").write_text('{"images": [')
    for root, words in (("nowhere", "nowhere"), (".", "instances_train2017.json")):
        refused = job(folder, *DEBUG, "--data.root", root, "--model.backbone-weights", "none", "--train.run-dir", "bad")
        assert refused.wait() == [2]
        assert refused.text().startswith("error: ") and refused.text().count("\n") == 1 and words in refused.text()
        assert not (folder / "bad").exists()


def test_an_offline_wandb_run_holds_everything(folder: Path) -> None:
    args = (*DEBUG, "--wandb.mode", "offline", "--train.run-dir", "logged", "--train.max-steps", "4")
    done = job(folder, *args)
    assert done.wait() == [0], done.text()
    (file,) = (folder / "logged").rglob("run-*.wandb")
    run = read_run(file)
    logged = {name for row in run.history for name in row}
    assert {"train/loss", "train/loss_ce_0", "train/weighted/loss_giou", "lr/backbone", "grad_norm"} <= logged
    assert {"images_per_second", "memory_gb", "val/AP", "val/AP_class/ellipse", "val/panel", "val/AP_table"} <= logged
    assert run.config["model"]["backbone"] == "resnet18" and run.config["parameters"]["trainable"] > 0
    assert "git_commit" in run.config
    assert torch.load(folder / "logged" / "last.ckpt", weights_only=True)["state"]["wandb_run_id"] == run.id


def small_batch() -> list[MicroBatch]:
    """Eight images of different sizes, one without objects, each as a batch of its own."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for i in range(8):
        image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)
        boxes = 0.3 + 0.3 * torch.rand(i % 4, 4, generator=generator)
        labels = torch.randint(0, 5, (i % 4,), generator=generator)
        batches.append((pad_images([image]), [Target(labels, boxes, i, (64, 64), (64, 64))]))
    return batches


def gradients(model: DETR, micro_batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    """The gradient that a training step hands to the optimizer."""
    fabric = Fabric(accelerator="cpu", devices=1)
    cfg = load_preset("debug").resolve()
    optimizer = build_optimizer(model, OptimConfig())
    wrapped, optimizer = fabric.setup(model, optimizer)
    optimizer.zero_grad = lambda: None
    run = SimpleNamespace(
        cfg=cfg,
        fabric=fabric,
        model=wrapped,
        criterion=SetCriterion(5),
        optimizer=optimizer,
        state=State(),
        softmax_steps=0,
        preemption=Preemption(),
    )
    object.__setattr__(cfg.optim, "clip_max_norm", 0.0)
    training_step(run, micro_batches)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_four_accumulated_batches_of_two_give_the_gradient_of_one_of_eight() -> None:
    images = small_batch()

    def joined(parts: list[MicroBatch]) -> MicroBatch:
        return pad_images([b.images[0] for b, _ in parts]), [t for _, targets in parts for t in targets]

    whole = gradients(small_detr(), [joined(images)])
    split = gradients(small_detr(), [joined(images[i : i + 2]) for i in range(0, 8, 2)])
    assert whole.keys() == split.keys() and len(whole) > 50
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-5, atol=1e-5 * max(1.0, float(gradient.abs().max())))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("step", {0: 1, 9: 1, 10: 0.1, 20: 0.01}), ("one-cycle", {0: 0.25, 3: 1, 40: 0}), ("constant", {0: 1, 39: 1})],
)
def test_learning_rates_follow_the_schedule(schedule: str, expected: dict[int, float]) -> None:
    model = small_detr()
    optim = OptimConfig(lr=1.0, lr_backbone=0.5, schedule=schedule, lr_drop=2)
    optimizer = build_optimizer(model, optim)
    scheduler = build_scheduler(optimizer, optim, steps_per_epoch=5, total_steps=40)
    rates = []
    for _ in range(41):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    for step, factor in expected.items():
        assert rates[step] == pytest.approx([factor, 0.5 * factor])


def test_real_images_train_evaluate_and_resume(coco_mini: Path, tmp_path: Path) -> None:
    args = [
        *("--preset", "r18_coco", "--data.root", str(coco_mini), "--data.scales", "128", "160"),
        *("--data.max-size", "200", "--data.val-limit", "12", "--data.workers", "1", "--eval.attention-images", "4"),
        *("--model.backbone-weights", "none", "--model.enc-layers", "1", "--model.dec-layers", "2"),
        *("--train.run-dir", "run", "--train.log-every", "1", "--wandb.mode", "disabled"),
    ]
    first = job(tmp_path, *args, "--train.max-steps", "3")
    assert first.wait() == [0] and "80 training and 12 validation images" in first.text(), first.text()
    resumed = job(tmp_path, *args, "--train.max-steps", "5")
    assert resumed.wait() == [0], resumed.text()
    assert [r["step"] for r in records(tmp_path / "run") if "train/loss" in r] == [1, 2, 3, 4, 5]
    done = python("-m", "detr_fabric.evaluate", "run/last.ckpt", cwd=tmp_path)
    assert done.returncode == 0 and "AP50" in done.stdout and "person" in done.stdout, done.stderr


def break_drawing() -> None:
    def broken(*args: object) -> None:
        raise ValueError("no picture")

    patch(recorder, "draw", broken)


def test_a_drawing_that_fails_costs_one_line_and_the_end_names_what_there_is(folder: Path) -> None:
    args = (*DEBUG, "--train.run-dir", "undrawn", "--train.max-steps", "2")
    done = Job(*args, cwd=folder, target=break_drawing, XDG_CACHE_HOME=str(folder / "cache"))
    assert done.wait() == [0], done.text()
    assert "undrawn: ValueError: no picture; training goes on" in done.text() and "Traceback" not in done.text()
    assert "done    best AP 0." in done.text() and "undrawn/best.ckpt --confusion" in done.text()
    assert (folder / "undrawn" / "evaluation.json").exists() and (folder / "undrawn" / "best.ckpt").exists()


def test_a_run_whose_validation_data_have_no_object_has_a_best_checkpoint(folder: Path) -> None:
    write_root(folder / "empty", coco(), coco(annotations=[]))
    args = (*DEBUG, "--train.run-dir", "none", "--data.root", "empty", "--model.backbone-weights", "none")
    done = job(folder, *args, "--train.batch-size", "2", "--train.max-steps", "2", "--data.scales", "32")
    assert done.wait() == [0], done.text()
    assert "AP –  AP50 –" in done.text() and "done    best AP –" in done.text()
    assert (folder / "none" / "best.ckpt").exists()
