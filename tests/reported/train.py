"""Reported cases of training: what must be seen of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from detr_fabric.config import Config
from detr_fabric.runtime.checkpoint import load_checkpoint
from detr_fabric.runtime.notes import notes
from tests.commands import records, steps
from tests.offline_wandb import read_runs
from tests.reported.runs import (
    ALLOWED,
    STEPS_AN_EPOCH,
    at_once,
    base,
    command,
    evaluates_where_output_is,
    full_shared_memory,
    kill_before,
    run,
    see,
)

TRAIN, DEBUG = ("-m", "detr_fabric.train"), ("-m", "detr_fabric.train", "--preset", "debug")


def resume_file_with_run_dir(at: Path) -> None:
    base(at)
    args = ("--train.epochs", "40", "--eval.every", "100", "--train.resume", "base/epoch_0001.ckpt")
    kill_before(at, "forkA", 13, *args)
    text = run(at, "forkA", *args, "--train.max-steps", "14")
    see("resumed at step 12" in text, "it does not go on from its own checkpoint")
    see(steps(at / "forkA") == list(range(9, 15)), f"steps {steps(at / 'forkA')}")


def fork_shares_wandb_run(at: Path) -> None:
    offline = ("--wandb.mode", "offline", "--train.max-steps")
    run(at, "w", *offline, "2")
    run(at, "fork", *offline, "4", "--train.resume", "w/last.ckpt")
    ids = [load_checkpoint(at / name / "last.ckpt")["state"]["wandb_run_id"] for name in ("w", "fork")]
    see(None not in ids and ids[0] != ids[1], f"W&B ids {ids}")


def fork_has_no_best(at: Path) -> None:
    base(at)
    run(at, "best", "--train.resume", "base/epoch_0001.ckpt", "--optim.lr", "1e-3", ALLOWED)
    see((at / "best" / "best.ckpt").exists(), "no best.ckpt")


def slurm_ntasks(at: Path) -> None:
    base(at)
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "x.sh", "SLURM_NTASKS": "4", "SLURM_NNODES": "1"}
    command(at, "-m", "detr_fabric.evaluate", "base/last.ckpt", **job)
    command(at, "-c", "from detr_fabric import load; load('base/last.ckpt', accelerator='cpu')", **job)
    command(at, *DEBUG, "--train.max-steps", "1", "--train.run-dir", "slurm", code=None, **job)


def sbatch_without_srun(at: Path) -> None:
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train.sh", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    args = (*DEBUG, "--train.max-steps", "2", "--train.run-dir", "sbatch")
    command(at, *args, code=None, timeout=60, SLURM_NODELIST="localhost", **job)


def rank_in_environment(at: Path) -> None:
    see("lrr" in command(at, *TRAIN, "--optim.lrr", "3", code=2, RANK="1"), "a mistake is not said")
    see("--optim.lr" in command(at, *TRAIN, "--help", RANK="1"), "--help prints nothing")
    for rank in ("", "1"):
        see("nope" in command(at, *TRAIN, "--preset", "nope", code=2, RANK=rank), "a wrong preset is not said")
    args = (*DEBUG, "--train.max-steps", "2", "--train.run-dir", "rank")
    alone = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29544"}
    see("WORLD_SIZE" in command(at, *args, code=None, **alone), "WORLD_SIZE is ignored without a word")


def presets_and_experiments(at: Path) -> None:
    theirs = at / "proj" / "experiments"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").touch()
    (theirs / "run_all.py").write_text("print(1)\n")
    command(at / "proj", *TRAIN, "--preset", "r18_coco", "--print-config")
    see("run_all" not in command(at / "proj", *TRAIN, "--help"), "--help lists the project's own scripts as presets")
    mine = at / "mypre"
    mine.mkdir()
    (mine / "base.py").write_text("from experiments.debug import config\n")
    (mine / "mine.py").write_text("import base\nconfig = base.config\n")
    command(at, *TRAIN, "--preset", "mypre/mine.py", "--print-config")


def wandb_environment(at: Path) -> None:
    given = {"WANDB_PROJECT": "myproj", "WANDB_NAME": "myname", "WANDB_TAGS": "t1,t2", "WANDB_RUN_ID": "myid123"}
    (at / "wdir").mkdir()
    args = ("--wandb.mode", "offline", "--train.max-steps", "2")
    run(at, "env", *args, WANDB_DIR=str(at / "wdir"), **given)
    found = read_runs(at / "wdir") or read_runs(at / "env")
    see(found, "no offline run was written")
    values = (found[0].project, found[0].name, ",".join(found[0].tags), found[0].id)
    see(values == tuple(given.values()), f"project, name, tags and id are {values}")
    see(read_runs(at / "wdir"), "WANDB_DIR is ignored")
    args = ("--wandb.mode", "None", "--train.max-steps", "1")
    run(at, "disabled", *args, WANDB_DISABLED="true")
    see(not read_runs(at / "disabled"), "WANDB_DISABLED=true wrote a run")


def boolean_flags(at: Path) -> None:
    flags = ("--model.pre-norm=True", "--model.pre-norm True", "--loss.aux-loss=False", "--no-loss.aux-loss")
    flags += ("--data.crop", "--data.no-crop", "--data.crop false", "--data.crop=True", "--train.preflight false")
    refused = []
    for flag in flags:
        try:
            command(at, *DEBUG, *flag.split(), "--print-config")
        except AssertionError:
            other = flag.replace("--no-loss.", "--loss.no-")
            try:
                command(at, *DEBUG, *other.split(), "--print-config")
            except AssertionError:
                refused.append(flag)
    see(not refused, f"refused: {', '.join(refused)}")


def max_steps(at: Path) -> None:
    run(at, "steps", "--train.max-steps", "20")
    see(max(steps(at / "steps")) == 20, f"{max(steps(at / 'steps'))} steps")


def unused_settings(at: Path) -> None:
    default = Config()
    changed = {
        "warmup": replace(default, optim=replace(default.optim, warmup=0.05)),
        "lr-drop": replace(default, train=replace(default.train, epochs=50)),
        "alpha": replace(default, attn=replace(default.attn, alpha=1.3)),
        "topk": replace(default, attn=replace(default.attn, topk=8)),
    }
    for name, config in changed.items():
        see(any(name in note for note in notes(config, STEPS_AN_EPOCH)), f"{name} has no effect, and that is not said")


def start_weights_dilation(at: Path) -> None:
    run(at, "dilated", "--model.last-stage", "layer4", "--model.dilation", "--train.max-steps", "1")
    args = ("--model.last-stage", "layer4", "--train.max-steps", "1", "--model.checkpoint", "dilated/last.ckpt")
    try:
        text = run(at, "plain", *args)
    except AssertionError:
        text = run(at, "plain", *args, code=2)
    see("dilation" in text, "weights of a dilated model are taken without a word")


def validation_loss(at: Path) -> None:
    keys = {key for record in records(base(at)) for key in record}
    missing = {"val/loss", "val/class_error", "val/cardinality_error"} - keys
    see(not missing, f"not logged: {', '.join(sorted(missing))}")


CASES: dict[str, Callable[[Path], object]] = {
    "01_resume_file_with_run_dir": resume_file_with_run_dir,
    "02_fork_shares_wandb_run": fork_shares_wandb_run,
    "03_fork_has_no_best": fork_has_no_best,
    "04_parallel_starts_same_folder": at_once,
    "05_slurm_ntasks_traceback": slurm_ntasks,
    "06_sbatch_without_srun_hangs": sbatch_without_srun,
    "07_rank_in_environment_silences": rank_in_environment,
    "08_presets_and_experiments_folder": presets_and_experiments,
    "09_wandb_environment_ignored": wandb_environment,
    "10_boolean_flags_in_sweeps": boolean_flags,
    "11_max_steps_capped_by_epochs": max_steps,
    "12_unused_settings_are_silent": unused_settings,
    "13_start_weights_dilation": start_weights_dilation,
    "14_no_validation_loss": validation_loss,
    "15_small_dev_shm_hangs": full_shared_memory,
    "16_latin1_output_loses_evaluation": lambda at: evaluates_where_output_is(at, "iso-8859-1"),
}
