"""Which launcher started this process: torchrun, srun or none. Standard library only.

A variable alone is no launcher. A batch job holds SLURM_NTASKS although nobody called srun, and some Kubernetes
operators set RANK and WORLD_SIZE for plain Python. Such a process trains alone, and `unlaunched` says so.
"""

from __future__ import annotations

import os

TORCHRUN = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
FIRST_STEP_WITHOUT_SRUN = 0xFFFFFFF0  # SLURM's numbers for the batch script, a shell of salloc, and the like


def forget_empty() -> None:
    """Removes variables of launchers that are set to nothing, as RANK= of some operators: they say nothing."""
    for name in {*TORCHRUN, *SRUN} & {key for key, value in os.environ.items() if not value}:
        del os.environ[name]


def under_torchrun() -> bool:
    """Whether torchrun, or --train.devices, started this process."""
    return all(os.environ.get(name) for name in TORCHRUN)


def under_srun() -> bool:
    """Whether srun started this process as one of several tasks; a shell of `srun --pty bash` is no such task."""
    step = os.environ.get("SLURM_STEP_ID", "")
    if under_torchrun() or not step.isdigit() or int(step) >= FIRST_STEP_WITHOUT_SRUN:
        return False
    return all(os.environ.get(name) for name in SRUN) and _tasks() > 1 and os.environ.get("SLURM_JOB_NAME") != "bash"


def launched() -> tuple[int, int] | None:
    """(nodes, processes a node) as a launcher started them; None where there is no launcher."""
    if under_torchrun():
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // per_node, per_node
    if under_srun():
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or 1)
        return nodes, _tasks() // nodes
    return None


def rank() -> int:
    """This process's number among all that its launcher started; 0 where there is no launcher."""
    if under_torchrun():
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if under_srun() else 0


def unlaunched() -> str | None:
    """A sentence about variables that promise several processes although no launcher started this one; else None."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        count = os.environ.get(name, "")
        if launched() is None and count.isdigit() and int(count) > 1 and os.environ.get("SLURM_JOB_NAME") != "bash":
            return f"{name} is {count}, but neither torchrun nor srun started this process: it runs alone"
    return None


def _tasks() -> int:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ["SLURM_NTASKS"])
