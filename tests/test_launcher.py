"""What is a launcher and what is not, by the variables that torchrun, srun, batch jobs and Kubernetes set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from detr_fabric.errors import UserError
from detr_fabric.launcher import launched, rank, unlaunched
from detr_fabric.runtime.launch import build_fabric, single_device

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "12", "LOCAL_WORLD_SIZE": "6", "RANK": "7", "LOCAL_RANK": "1"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "detr", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3", "SLURM_PROCID": "3"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in TORCHRUN]:
        monkeypatch.delenv(name)
    yield
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # build_fabric sets them for srun


def test_torchrun_and_slurm_decide_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "12")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    for name, value in (("RANK", "0"), ("GROUP_RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert launched() == (2, 6)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("WORLD_SIZE")
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert launched() == (2, 4)
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert launched() is None


@pytest.mark.parametrize(
    ("variables", "processes", "number"),
    [
        (TORCHRUN, (2, 6), 7),
        (STEP, (2, 4), 3),
        ({**STEP, "SLURM_JOB_NAME": "interactive"}, (2, 4), 3),  # srun inside salloc
        (STEP | TORCHRUN, (2, 6), 7),  # torchrun inside srun
        ({**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}, (1, 2), 3),  # a part of the job
        (BATCH, None, 0),
        ({**BATCH, "SLURM_STEP_ID": "4294967291"}, None, 0),  # the batch script's own step
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, None, 0),  # srun python, once: --train.devices decides
        ({"RANK": "1"}, None, 0),
        ({"RANK": ""}, None, 0),
        ({**TORCHRUN, "RANK": ""}, None, 0),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, None, 0),
        ({"SLURM_PROCID": "3"}, None, 0),
    ],
)
def test_only_a_launcher_makes_ranks(
    variables: dict[str, str], processes: tuple[int, int] | None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() == processes and rank() == number


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, None),
        (TORCHRUN, None),
        (STEP, None),
        ({**STEP, "SLURM_JOB_NAME": "bash"}, None),
        (BATCH, "SLURM_NTASKS is 8"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "many"}, None),
    ],
)
def test_a_process_alone_that_may_have_been_meant_as_one_of_many_says_so_and_works(
    variables: dict[str, str], said: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert single_device("cpu", None).world_size == 1
    assert said in (unlaunched() or "") if said else unlaunched() is None
    if launched() is None:
        fabric = build_fabric("cpu", None, None, broadcast_buffers=False)
        assert (fabric.world_size, fabric.global_rank) == (1, 0)
        assert (said or "") in capsys.readouterr().err


def test_a_rank_under_srun_finds_the_others_by_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**STEP, "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NODEID": "1"}.items():
        monkeypatch.setenv(name, value)
    fabric = build_fabric("cpu", None, None, broadcast_buffers=False)
    environment = fabric.strategy.cluster_environment
    assert (environment.world_size(), environment.global_rank(), environment.local_rank()) == (8, 3, 3)
    assert (environment.node_rank(), environment.main_address, environment.main_port) == (1, "gpu07", 15770)


def test_the_number_of_devices_has_to_agree_with_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--train.devices 2: the launcher started 6 processes"):
        build_fabric("cpu", 2, None, broadcast_buffers=False)


@pytest.mark.process
def test_variables_without_a_value_are_no_obstacle_to_fabric() -> None:
    empty = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"), "")
    code = "from detr_fabric import load; print(load)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | empty, capture_output=True, text=True)
    assert done.returncode == 0 and "function load" in done.stdout, done.stderr


@pytest.mark.process
def test_help_and_mistakes_are_said_whatever_rank_a_variable_claims(tmp_path: object) -> None:
    for variables in ({"RANK": "1"}, {"RANK": ""}, {"SLURM_PROCID": "3"}):
        for args, code in (["--optim.lrr", "3"], 2), (["--help"], 0):
            command = [sys.executable, "-m", "detr_fabric.train", *args]
            done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
            assert done.returncode == code and len(done.stdout + done.stderr) > 50, done.stderr
