"""From a config to devices, ranks and precision: the one place that builds Fabric."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from lightning_fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import nn

from detr_fabric.config import Precision
from detr_fabric.errors import UserError
from detr_fabric.signals import Preempted

LOST_CONTACT = re.compile(r"gloo|NCCL|TCPStore|[Cc]onnection (closed|reset|refused)|Broken pipe")
SECONDS_TO_BE_KILLED = 20


def make_deterministic() -> None:
    """PyTorch's deterministic algorithms only, an error where there is none. Has to be called before CUDA starts."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):  # those that PyTorch accepts
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def build_fabric(accelerator: str, devices: int | None, precision: Precision | None, broadcast_buffers: bool) -> Fabric:
    """Fabric on one device, or DDP over several; under torchrun or SLURM the launcher's number of processes rules.

    broadcast_buffers: whether all ranks take rank 0's batch statistics (trainable batch norm).
    Raises UserError for devices or a precision that this machine does not have.
    """
    cuda, precision = _device_type(accelerator, precision)
    nodes, per_node = launched() or (1, devices or 1)
    if devices is not None and per_node != devices:
        raise UserError(f"--train.devices {devices}: the launcher started {per_node} processes a node; leave it out")
    if cuda and per_node > torch.cuda.device_count():
        raise UserError(
            f"{per_node} processes on this machine need as many GPUs, but {torch.cuda.device_count()} are visible: "
            "lower --train.devices or --nproc_per_node"
        )
    # newer versions of PyTorch have another name for it, which the older ones do not know
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    return Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=per_node,
        num_nodes=nodes,
        strategy=DDPStrategy(broadcast_buffers=broadcast_buffers) if nodes * per_node > 1 else "auto",
        precision=precision,
    )


def single_device(accelerator: str, precision: Precision | None) -> Fabric:
    """Fabric in this process alone, whatever launched it. Raises UserError as build_fabric does."""
    cuda, precision = _device_type(accelerator, precision)
    return Fabric(accelerator="cuda" if cuda else "cpu", devices=1, precision=precision)


def _device_type(accelerator: str, precision: Precision | None) -> tuple[bool, Precision]:
    """Whether a GPU is used, and the arithmetic."""
    cuda = torch.cuda.is_available() if accelerator == "auto" else accelerator == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("accelerator cuda: no CUDA device is visible; use auto or cpu")
    if precision is None:
        precision = "bf16-mixed" if cuda and torch.cuda.is_bf16_supported() else "32-true"
    if precision == "16-mixed" and not cuda:
        raise UserError("precision 16-mixed needs a GPU: use bf16-mixed or 32-true")
    return cuda, precision


def launched() -> tuple[int, int] | None:
    """(nodes, processes a node) as torchrun or SLURM started them; None where neither did.

    Fabric has to be told: with devices=1 under torchrun every process would train on its own, as rank 0.
    """
    if TorchElasticEnvironment.detect():
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // per_node, per_node
    if SLURMEnvironment.detect() and SLURMEnvironment.job_name() not in ("bash", "interactive"):
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return nodes, int(os.environ["SLURM_NTASKS"]) // nodes
    return None


def launch_id() -> tuple[str, bool]:
    """What torchrun or SLURM keep when they start the same job again, and whether they have done so."""
    if TorchElasticEnvironment.detect():  # the agent lives on
        launch = f"torchrun {socket.gethostname()} {os.getppid()} {os.environ['TORCHELASTIC_RUN_ID']}"
        return launch, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if "SLURM_JOB_ID" in os.environ:
        job = f"slurm {os.environ['SLURM_JOB_ID']} {os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
        return job, os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return f"process {os.getpid()}", False


def end_together(fabric: Fabric) -> None:
    """Where Fabric started the other ranks: the first that dies takes all others along, and none outlives rank 0.

    torchrun and SLURM see to this themselves. Threads, for a rank inside a collective hears of nothing.
    """
    launcher = fabric.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher) or launched() is not None:
        return
    if fabric.is_global_zero:
        threading.Thread(target=_watch_ranks, args=(launcher.procs,), daemon=True).start()
    else:
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()


def leave_together() -> None:
    """Ends the process group before the interpreter does, which may abort while gloo's threads still run."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def first_error_only(fabric: Fabric) -> Iterator[None]:
    """Keeps a rank quiet that fails because another one did: what its launcher kills it for has been said."""
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception as error:
        if fabric.world_size == 1:
            raise
        lost = isinstance(error, torch.distributed.DistError) or LOST_CONTACT.search(str(error)) is not None
        if lost or not fabric.is_global_zero:
            time.sleep(SECONDS_TO_BE_KILLED if lost else 3)
        if not lost:
            raise
        raise UserError(
            f"rank {fabric.global_rank} has lost contact with another one; see what that one said"
        ) from error


def _watch_ranks(processes: list[subprocess.Popen[bytes]]) -> None:
    while True:
        time.sleep(0.2)
        for rank, process in enumerate(processes, start=1):
            code = process.poll()
            if code:
                if code < 0:  # else it has said why
                    print(f"error: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
                for other in processes:
                    other.kill()
                os._exit(max(code, 1))


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def settle_reduction_order(fabric: Fabric, model: nn.Module) -> None:
    """Two passes without effect. After its first backward pass DDP arranges the gradients anew and from then on sums
    over ranks in another order; with three ranks and more a resumed run would differ from one that never stopped."""
    if fabric.world_size < 3:
        return
    buffers = [buffer.clone() for buffer in model.buffers()]
    images = torch.zeros(1, 3, 64, 64, device=fabric.device)
    for _ in range(2):
        outputs = model(images, torch.zeros(1, 64, 64, dtype=torch.bool, device=fabric.device))
        fabric.backward(sum(output.float().sum() for output in outputs))
    model.zero_grad()
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
