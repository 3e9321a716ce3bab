"""A loss or a gradient that is not finite, in whole runs: all ranks stop together, or leave the step out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import nn

from detr_fabric import build, loop, replay
from detr_fabric.data.batch import MicroBatch
from detr_fabric.evaluate import __main__ as evaluate
from detr_fabric.loss.criterion import Losses, SetCriterion
from detr_fabric.model.batch_statistics import BatchStatistics
from detr_fabric.optimizer import build_optimizer
from detr_fabric.runtime.checkpoint import load_checkpoint, read_torch_file, save_checkpoint
from detr_fabric.runtime.nonfinite import REPLAY_FILE
from detr_fabric.runtime.run import Run, Step
from detr_fabric.tracking.recorder import Recorder
from tests.commands import Job, records
from tests.offline_wandb import read_run
from tests.patching import patch
from tests.same_runs import assert_same, losses_of

DEBUG = ("--preset", "debug", "--train.log-every", "1", "--train.checkpoint-minutes", "0")
FEW = ("--eval.attention-images", "0", "--wandb.panel-images", "0", "--data.val-limit", "2")
LAYER = "transformer.decoder.layers.0"

Fault = Literal["loss", "gradient", "total", "nothing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


def job(folder: Path, run: str, *args: str, ranks: int = 1, target: Any = None) -> Job:
    cache = str(folder / "cache")
    images = ("--train.batch-size", str(8 // ranks))  # 8 steps an epoch
    args = (*DEBUG, *FEW, *images, "--train.run-dir", run, *args)
    return Job(*args, cwd=folder, ranks=ranks, target=target, XDG_CACHE_HOME=cache)


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


# ---- faults, put into a running process


def break_steps(fault: Fault, rank: int, *steps: int) -> None:
    """While these steps run on this rank, and while they are looked into, weights of a decoder layer are such that the
    loss is NaN, or such that the loss is what it was, but its gradient is too large for float32. "total": the loss is
    infinite, its gradient as ever. "nothing": these steps are not run at all."""
    whole, look_into = loop.training_step, loop.drop_step

    @contextmanager
    def broken(run: Run, number: int) -> Iterator[Run]:
        if number not in steps or run.fabric.global_rank != rank:
            yield run
            return
        layer = run.model.module.get_submodule(LAYER)
        before = [p.clone() for p in layer.parameters()]
        with torch.no_grad():
            if fault == "total":
                run = run._replace(criterion=Infinite(run.criterion))
            elif fault == "loss":
                layer.linear1.weight[3, 5] = float("nan")
            else:
                layer.linear1.weight.mul_(1e-25)
                layer.linear1.bias.mul_(1e-25)
                layer.linear2.weight.mul_(1e25)
        try:
            yield run
        finally:
            with torch.no_grad():
                for p, value in zip(layer.parameters(), before, strict=True):
                    p.copy_(value)

    def training_step(run: Run, micro_batches: list[MicroBatch]) -> Step:
        number = run.state.step + 1
        if fault == "nothing" and number in steps:
            return not_run(run, number)
        with broken(run, number) as run:
            return whole(run, micro_batches)

    def drop_step(run: Run, step: Step) -> str:
        with broken(run, step.number) as run:
            return look_into(run, step)

    patch(loop, "training_step", training_step)
    if fault == "nothing":
        count = Recorder.count
        patch(Recorder, "count", lambda recorder, step: step.losses.losses and count(recorder, step))
    else:
        patch(loop, "drop_step", drop_step)


def not_run(run: Run, number: int) -> Step:
    """A step without a gradient."""
    nan, before = torch.tensor(float("nan")), BatchStatistics(run.model.module)
    return Step(number, [], torch.zeros(2), 0, before, Losses(nan, {}, {}), nan, True, False, False)


class Infinite(nn.Module):
    """A criterion whose total gets an infinite constant."""

    def __init__(self, criterion: SetCriterion) -> None:
        super().__init__()
        self.criterion, self.normalizers = criterion, criterion.normalizers

    def forward(self, *args: Any, **kwargs: Any) -> Losses:
        losses = self.criterion(*args, **kwargs)
        return losses._replace(total=losses.total + math.inf)


@pytest.mark.parametrize(("ranks", "log_every"), [(1, 1), (2, 100)])
@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("loss", f"the output of {LAYER}.linear1, whose weight is not finite"),
        ("gradient", f"the gradient of {LAYER}.linear1."),
    ],
    ids=["loss", "gradient"],
)
def test_all_ranks_stop_at_the_same_step_with_one_sentence_and_a_step_that_can_be_run_again(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    place: str,
    ranks: int,
    log_every: int,
) -> None:
    run, every = f"stop_{fault}{ranks}", ("--train.log-every", str(log_every))
    going = job(folder, run, *every, ranks=ranks, target=partial(break_steps, fault, ranks - 1, 3))
    assert going.wait() == [2] * ranks, going.text()
    (said,) = errors(going.text())
    assert "Traceback" not in going.text()
    what = "the loss (loss_ce, " if fault == "loss" else "the gradient"
    assert said.startswith(f"error: step 3: {what}") and f"is not finite, first {place}" in said
    assert str(Path(run) / REPLAY_FILE) in said and "--optim.lr" in said and "--train.on-nonfinite skip" in said
    kept = [load_checkpoint(folder / run / name)["state"]["step"] for name in ("last.ckpt", "previous.ckpt")]
    assert kept == [2, 1] and not list((folder / run).glob("*.tmp"))

    file = folder / run / REPLAY_FILE
    saved = torch.load(file, weights_only=True)
    images = [target[2] for part in saved["micro_batches"] for target in part["targets"]]
    assert len(images) == 8 // ranks and f"images {', '.join(map(str, images))};" in said
    assert saved["rank"] == ranks - 1

    monkeypatch.setattr("sys.argv", ["replay", str(file if fault == "loss" else file.parent)])
    replay.main()
    printed = capsys.readouterr().out
    assert f"step 3, rank {ranks - 1}, images {', '.join(map(str, images))}" in printed
    then, now = (line.partition(": ")[2].strip() for line in printed.splitlines()[-2:])
    assert then == now and then.startswith(place) and f"first {then}, in a batch" in said
    for line in printed.splitlines():
        if line.startswith("loss"):
            then, now = map(float, line.split()[1:])
            assert then == pytest.approx(now, rel=1e-4, nan_ok=True)


def test_so_can_a_step_of_conditional_attention_with_focal_loss(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model.cross-attention", "conditional", "--loss.kind", "focal")
    going = job(folder, "conditional", *model, target=partial(break_steps, "loss", 0, 2))
    assert going.wait() == [2], going.text()
    monkeypatch.setattr("sys.argv", ["replay", str(folder / "conditional")])
    replay.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("loss")]
    then, now = torch.tensor([[float(value) for value in line[1:]] for line in lines]).T
    assert len(lines) >= 3
    torch.testing.assert_close(now, then, rtol=1e-4, atol=0, equal_nan=True)


def test_a_loss_that_is_infinite_on_one_rank_stops_both_though_every_gradient_is_finite(folder: Path) -> None:
    going = job(folder, "total", ranks=2, target=partial(break_steps, "total", 1, 2))
    assert going.wait() == [2, 2], going.text()
    (said,) = errors(going.text())
    assert said.startswith("error: step 2: the loss is not finite, first the total loss, in a batch of images ")


@pytest.mark.parametrize(("fault", "ranks", "log_every"), [("loss", 2, 2), ("gradient", 1, 1)])
def test_a_dropped_step_leaves_weights_moments_and_statistics_as_if_it_had_not_been_run(
    folder: Path, fault: Fault, ranks: int, log_every: int
) -> None:
    """The same run, whose third step is never computed, has the same weights, batch statistics, moments and learning
    rates at the end, and the same losses at every other step. With two ranks it is stopped and resumed on the way."""
    run = f"skip_{fault}{log_every}"
    skip = ("--train.on-nonfinite", "skip", "--train.log-every", str(log_every))
    halves = [("--train.max-steps", "5"), ("--train.max-steps", "7")][2 - ranks :]
    for half in halves:
        bad = partial(break_steps, fault, ranks - 1, 3) if half == halves[0] else None
        going = job(folder, run, *skip, *half, ranks=ranks, target=bad)
        assert going.wait() == [0] * ranks, going.text()
    not_run = partial(break_steps, "nothing", 0, 3)
    reference = job(folder, f"{run}_not_run", *skip, *halves[-1], ranks=ranks, target=not_run)
    assert reference.wait() == [0] * ranks, reference.text()
    contents = [load_checkpoint(folder / name / "last.ckpt") for name in (run, f"{run}_not_run")]
    for key in ("model", "optimizer", "precision"):
        assert_same(*(content[key] for content in contents))
    assert any("running_mean" in name for name in contents[0]["model"])
    assert contents[0]["state"]["dropped"] == 1 and contents[0]["state"]["dropped_in_a_row"] == 0
    logged = [[r for r in records(folder / name) if "grad_norm" in r] for name in (run, f"{run}_not_run")]
    losses, expected = ({r["step"]: losses_of(r) for r in half if r["step"] != 3} for half in logged)
    assert losses.keys() >= expected.keys() == {2: {2, 4, 6, 7}, 1: {1, 2, 4, 5, 6, 7}, 100: {7}}[log_every]
    assert all(losses[step] == value for step, value in expected.items())
    assert log_every > 1 or logged[0][2]["grad_norm"] is None
    (drop,) = [r for r in records(folder / run) if "dropped_steps" in r]
    assert (drop["step"], drop["dropped_steps"]) == (3, 1) and LAYER in drop["dropped"]
    assert (folder / run / REPLAY_FILE).exists()


def test_a_run_gives_up_after_so_many_bad_steps_in_a_row_and_not_before(folder: Path) -> None:
    limit = ("--train.on-nonfinite", "skip", "--train.max-nonfinite", "3")
    bad = partial(break_steps, "loss", 0, 2, 3, 5, 6, 7, 8)
    going = job(folder, "limit", *limit, "--wandb.mode", "offline", target=bad)
    assert going.wait() == [2], going.text()
    (said,) = errors(going.text())
    assert "step 7: " in said and "3 steps in a row" in said and "--train.max-nonfinite" in said
    (wandb,) = (folder / "limit").rglob("run-*.wandb")
    for rows in (records(folder / "limit"), read_run(wandb).history):
        drops = [(row["step"], row["dropped_steps"]) for row in rows if "dropped_steps" in row]
        assert drops == [(2, 1), (3, 2), (5, 3), (6, 4)]
    assert read_torch_file(folder / "limit" / REPLAY_FILE)["step"] == 5  # the first of the last series
    assert load_checkpoint(folder / "limit" / "previous.ckpt")["state"]["step"] == 5
    state = load_checkpoint(folder / "limit" / "last.ckpt")["state"]
    assert (state["step"], state["dropped"], state["dropped_in_a_row"]) == (6, 4, 2)
    for command in (
        ("--train.resume", f"limit/{REPLAY_FILE}"),
        ("--model.checkpoint", f"limit/{REPLAY_FILE}"),
    ):
        refused = job(folder, "other", *command)
        assert refused.wait() == [2] and len(errors(refused.text())) == 1 and "Traceback" not in refused.text()
    again = job(folder, "limit", *limit, target=partial(break_steps, "loss", 0, 7))  # the counts are resumed
    assert again.wait() == [2] and "3 steps in a row" in again.text()


# ---- fp16


def fp16_with_one_bad_loss() -> None:
    """An overflow of the scale, then at step 2 a loss that is not finite, on rank 1 alone."""
    whole = build.build_fabric

    def build_fp16(*args: Any, **kwargs: Any) -> Fabric:
        fabric = whole(*args, **kwargs)
        fabric.strategy.precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40))
        return fabric

    patch(build, "build_fabric", build_fp16)
    patch(build, "build_optimizer", lambda model, optim, fused: build_optimizer(model, optim, fused=False))
    break_steps("loss", 1, 2)


def test_ranks_agree_that_a_loss_of_one_of_them_is_no_overflow(folder: Path) -> None:
    going = job(folder, "fp16", "--train.batch-size", "1", ranks=2, target=fp16_with_one_bad_loss)
    assert going.wait() == [2, 2], going.text()
    (said,) = errors(going.text())
    assert said.startswith("error: step 2: the loss (") and f"{LAYER}.linear1" in said
    norms = [record["grad_norm"] for record in records(folder / "fp16") if "grad_norm" in record]
    assert norms == [None]


@pytest.mark.gpu
def test_fp16_trains_on_a_gpu_through_overflows(folder: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    going = job(folder, "gpu", "--train.precision", "16-mixed", target=overflow_at_first)
    assert going.wait() == [0], going.text()
    norms = [record["grad_norm"] for record in records(folder / "gpu") if "grad_norm" in record]
    assert norms[0] is None and norms[-1] is not None
    assert load_checkpoint(folder / "gpu" / "last.ckpt")["state"]["dropped"] == 0


def overflow_at_first() -> None:
    whole = loop.training_step

    def with_a_large_scale(run: Run, micro_batches: list[MicroBatch]) -> Step:
        if run.state.step == 0:
            scaler = torch.amp.GradScaler(init_scale=2.0**40, growth_interval=1000)
            run.fabric.strategy.precision.scaler = scaler
        if run.state.step == 3:
            run.fabric.strategy.precision.scaler.update(2.0**10)
        return whole(run, micro_batches)

    patch(loop, "training_step", with_a_large_scale)


# ---- detections


def spoil_boxes_before_evaluation() -> None:
    score = loop.evaluate

    def spoiled(fabric: Fabric, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model.module.bbox_embed.layers[2].bias[1] = float("nan")
        return score(fabric, model, *args, **kwargs)

    patch(loop, "evaluate", spoiled)


def test_boxes_that_are_not_finite_are_an_error_and_never_a_score(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pycocotools would give them an AP of 0.69."""
    once = ("--train.max-steps", "1")
    going = job(folder, "boxes", *once, target=spoil_boxes_before_evaluation)
    assert going.wait() == [2], going.text()
    (said,) = errors(going.text())
    assert "are not finite: the model's weights have diverged" in said and "Traceback" not in going.text()
    run = folder / "boxes"
    assert not any("val/AP" in record for record in records(run))
    assert not (run / "evaluation.json").exists() and not (run / "best.ckpt").exists()

    content = load_checkpoint(run / "last.ckpt")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for name in ("bbox_embed.layers.2.bias", "class_embed.bias"):
        weights = {**content["model"], name: torch.full_like(content["model"][name], float("nan"))}
        save_checkpoint(folder / "nan.ckpt", {**content, "model": weights})
        monkeypatch.setattr("sys.argv", ["evaluate", "nan.ckpt", "--out", "scores.json"])
        with pytest.raises(SystemExit) as ended:
            evaluate.main()
        printed = capsys.readouterr()
        assert ended.value.code == 2 and "AP" not in printed.out and not (folder / "scores.json").exists()
        assert printed.err.startswith("error: detections of image ") and "are not finite" in printed.err
