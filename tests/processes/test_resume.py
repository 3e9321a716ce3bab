"""Resuming: one run per folder, changed settings, another number of ranks; a rank without objects."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from tests import faults
from tests.commands import Job, debug_job, records, steps
from tests.same_runs import assert_same_run

pytestmark = pytest.mark.faults


def stop_after(folder: Path, step: int, job: Job) -> None:
    """Asks a run that is held before this step to stop, which it does after it."""
    job.wait_until(faults.held(folder, step))
    job.signal(signal.SIGTERM)
    faults.release(folder, step)
    assert job.wait() == [75], job.text()


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_dead(folder: Path) -> None:
    first = debug_job(folder, "locked", "--data.workers", "2", target=partial(faults.wait_for_a_signal, 5))
    first.wait_until(lambda: steps(folder / "locked"))
    second = debug_job(folder, "locked")
    assert second.wait() == [2]
    assert second.text().count("\n") == 1 and f"process {first.processes[0].pid} on" in second.text()
    first.signal(signal.SIGKILL)
    first.wait()
    assert debug_job(folder, "locked").wait() == [0]  # though the first one's loader workers may live for a moment
    assert_same_run(folder / "locked", folder / "whole")


def test_settings_that_change_the_result_are_refused_unless_allowed(folder: Path) -> None:
    assert debug_job(folder, "settings", "--train.max-steps", "2").wait() == [0]
    refused = debug_job(folder, "settings", "--optim.lr", "0.01", "--data.flip", "0", "--train.log-every", "5")
    assert refused.wait() == [2]
    (line,) = refused.text().splitlines()
    assert "--optim.lr was 0.0001 and is now 0.01" in line and "--data.flip was 0.5" in line and "log" not in line
    allowed = debug_job(
        folder, "settings", "--optim.lr", "0.01", "--train.allow-config-change", "--train.max-steps", "4"
    )
    assert allowed.wait() == [0], allowed.text()
    assert "optim.lr: 0.0001 -> 0.01" in allowed.text()
    rates = [record["lr/transformer"] for record in records(folder / "settings") if "lr/transformer" in record]
    assert rates == [0.0001, 0.0001, 0.01, 0.01]
    other = debug_job(folder, "settings", "--data.shapes-train", "72", "--train.max-steps", "4")
    assert other.wait() == [2] and "the training data have changed" in other.text()


def test_a_run_that_is_already_past_a_new_end_is_evaluated_and_done(folder: Path) -> None:
    stop_after(folder, 5, debug_job(folder, "past", target=partial(faults.hold, 5)))
    done = debug_job(folder, "past", "--train.max-steps", "3")
    assert done.wait() == [0], done.text()
    assert [record["step"] for record in records(folder / "past") if "val/AP" in record] == [5]


def test_another_number_of_ranks_goes_on_with_the_same_epochs(folder: Path) -> None:
    assert debug_job(folder, "ranks", "--train.max-steps", "3").wait() == [0]
    refused = debug_job(folder, "ranks", ranks=2)
    assert refused.wait() == [2, 2] and "a step had 8 images and now has 16" in refused.text()
    going = debug_job(folder, "ranks", "--train.allow-config-change", ranks=2)
    assert going.wait() == [0, 0], going.text()
    assert "1 -> 2 ranks: 16 images a step instead of 8, from the start of epoch 1" in going.text()
    logged = [(r["step"], r["epoch"]) for r in records(folder / "ranks") if "grad_norm" in r]
    assert logged == [(1, 1 / 8), (2, 2 / 8), (3, 3 / 8), *((3 + i, i / 4) for i in range(1, 9))]
    same = debug_job(folder, "ranks2", "--train.max-steps", "3")
    assert same.wait() == [0]
    same = debug_job(folder, "ranks2", "--train.batch-size", "4", "--train.allow-config-change", ranks=2)
    assert same.wait() == [0, 0] and "the same images in every step" in same.text()
    whole, two = ([r["train/loss"] for r in records(folder / run) if "grad_norm" in r] for run in ("whole", "ranks2"))
    assert two[:3] == whole[:3] and two[3] == pytest.approx(whole[3], rel=0.05)


def test_a_rank_whose_images_hold_no_object_neither_hangs_nor_breaks_the_other(folder: Path) -> None:
    going = debug_job(folder, "empty", "--train.max-steps", "4", ranks=2, target=partial(faults.take_objects_away, 1))
    assert going.wait() == [0, 0], going.text()
    logged = [record for record in records(folder / "empty") if "grad_norm" in record]
    assert [r["step"] for r in logged] == [1, 2, 3, 4]
    assert all(0 < r["grad_norm"] < float("inf") and r["train/loss"] > 0 for r in logged)
    assert [r["train/loss_bbox"] == 0 for r in logged] == [False, True, False, False]


@pytest.mark.parametrize("kind", ["sparsemax", "entmax-learned"])
def test_a_run_killed_around_the_switch_from_softmax_equals_one_that_never_was(folder: Path, kind: str) -> None:
    """Softmax for the first 4 of 8 steps; killed before step 4, 5 (the first of the mapping) and 6."""
    args = ("--attn.kind", kind, "--train.max-steps", "8")
    whole = debug_job(folder, f"{kind}-whole", *args)
    assert whole.wait() == [0] and f"softmax up to step 4, then {kind}" in whole.text(), whole.text()
    for step in (4, 5, 6):
        going = debug_job(folder, f"{kind}-killed", *args, target=partial(faults.hold, step))
        going.wait_until(faults.held(folder, step))
        going.signal(signal.SIGKILL)
        going.wait()
        (folder / f"held-{step}").unlink()
    assert debug_job(folder, f"{kind}-killed", *args).wait() == [0]
    assert_same_run(folder / f"{kind}-whole", folder / f"{kind}-killed")
    other = debug_job(folder, f"{kind}-killed", "--attn.kind", kind, "--train.max-steps", "12")
    assert other.wait() == [2] and "--train.max-steps was 8 and is now 12" in other.text()


def test_two_ranks_switch_from_softmax_with_learned_alphas(folder: Path) -> None:
    args = ("--attn.kind", "entmax-learned", "--train.max-steps", "4", "--train.batch-size", "4")
    done = debug_job(folder, "switch-ranks", *args, ranks=2)
    assert done.wait() == [0, 0], done.text()
    alphas = [r["alpha/decoder_cross/layer0"] for r in records(folder / "switch-ranks") if "grad_norm" in r]
    assert alphas[0] == alphas[1] == 1.5 and alphas[2] != 1.5


def test_with_other_batches_softmax_ends_after_the_same_part_of_the_epochs(folder: Path) -> None:
    args = ("--attn.kind", "sparsemax", "--train.epochs", "4")
    stopped = debug_job(folder, "switch-batches", *args, target=partial(faults.hold, 9))
    stop_after(folder, 9, stopped)
    assert "softmax up to step 16, then sparsemax" in stopped.text()
    larger = debug_job(folder, "switch-batches", *args, "--train.batch-size", "16", "--train.allow-config-change")
    assert larger.wait() == [0], larger.text()
    assert "softmax up to step 13, then sparsemax" in larger.text()  # 9 steps of 8 images, then an epoch of 4 steps
