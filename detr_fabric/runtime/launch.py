"""From a config to devices, ranks and precision: the one place that builds Fabric."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import nn

from detr_fabric.config import Precision
from detr_fabric.errors import UserError
from detr_fabric.launcher import launched, under_srun, under_torchrun, unlaunched
from detr_fabric.runtime.arithmetic import computes_in_bf16
from detr_fabric.runtime.preemption import ASKING, Preempted, Preemption
from detr_fabric.terminal import say

LOST_CONTACT = re.compile(r"gloo|NCCL|TCPStore|[Cc]onnection (closed|reset|refused)|Broken pipe")
SECONDS_TO_BE_KILLED = 20


def make_deterministic() -> None:
    """PyTorch's deterministic algorithms only, an error where there is none. Has to be called before CUDA starts."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):  # those that PyTorch accepts
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def build_fabric(accelerator: str, devices: int | None, precision: Precision | None, broadcast_buffers: bool) -> Fabric:
    """Fabric for this process: alone, or a rank of DDP where a launcher started several.

    devices: as the user set them; launcher.launched() decides, and the two have to agree.
    broadcast_buffers: whether all ranks take rank 0's batch statistics (trainable batch norm).
    Raises UserError for devices or a precision that this machine does not have.
    """
    nodes, per_node = launched() or (1, 1)
    cuda, precision = _device_type(accelerator, precision, per_node)
    if devices is not None and per_node != devices:
        raise UserError(f"--train.devices {devices}: the launcher started {per_node} processes a node; leave it out")
    if cuda and per_node > torch.cuda.device_count():
        raise UserError(
            f"{per_node} processes on this machine need as many GPUs, but {torch.cuda.device_count()} are visible: "
            "lower --train.devices or --nproc_per_node"
        )
    if nodes * per_node == 1:
        if (sentence := unlaunched()) is not None:
            say(sentence, sys.stderr)
        return single_device(accelerator, precision)
    if under_srun():
        _name_as_torchrun(nodes, per_node)
    # newer versions of PyTorch have another name for it, which the older ones do not know
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    return Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=per_node,
        num_nodes=nodes,
        strategy=DDPStrategy(broadcast_buffers=broadcast_buffers),
        plugins=[TorchElasticEnvironment()],
        precision=precision,
    )


def single_device(device: str, precision: Precision | None) -> Fabric:
    """Fabric in this process alone, whatever launched it.

    device: auto, cpu, cuda, or a certain GPU: cuda:1. Raises UserError as build_fabric does.
    """
    accelerator, _, number = device.partition(":")
    if accelerator not in ("auto", "cpu", "cuda") or (number and not (accelerator == "cuda" and number.isdecimal())):
        raise UserError(f"device {device}: choose auto, cpu, cuda, or a certain GPU: cuda:1")
    cuda, precision = _device_type(accelerator, precision, 1)
    if number and int(number) >= torch.cuda.device_count():
        raise UserError(f"device {device}: {torch.cuda.device_count()} CUDA devices are visible, counted from cuda:0")
    environment = LightningEnvironment()  # else Fabric would take a batch job's variables for a launcher
    devices = [int(number)] if number else 1
    return Fabric(accelerator="cuda" if cuda else "cpu", devices=devices, plugins=[environment], precision=precision)


def _name_as_torchrun(nodes: int, per_node: int) -> None:
    """Gives srun's variables the names that torch.distributed reads. All ranks compute the same address and port."""
    env = os.environ
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "localhost"
    port = 15000 + (10 * int(env.get("SLURM_JOB_ID", 0)) + int(env["SLURM_STEP_ID"])) % 10000
    env["RANK"], env["LOCAL_RANK"], env["GROUP_RANK"] = (
        env["SLURM_PROCID"],
        env["SLURM_LOCALID"],
        env.get("SLURM_NODEID", "0"),
    )
    env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"] = str(nodes * per_node), str(per_node)
    env.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(hosts))
    env.setdefault("MASTER_PORT", str(port))


def _device_type(accelerator: str, precision: Precision | None, per_node: int) -> tuple[bool, Precision]:
    """Whether a GPU is used by each of so many processes on this machine, and the arithmetic."""
    cuda = torch.cuda.is_available() if accelerator == "auto" else accelerator == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("accelerator cuda: no CUDA device is visible; use auto or cpu")
    if precision is None:
        gpus = min(per_node, torch.cuda.device_count())
        precision = "bf16-mixed" if cuda and computes_in_bf16(gpus) else "32-true"
    if precision == "16-mixed" and not cuda:
        raise UserError("precision 16-mixed needs a GPU: use bf16-mixed or 32-true")
    return cuda, precision


def launch_id() -> tuple[str, bool]:
    """What torchrun or SLURM keep when they start the same job again, and whether they have done so."""
    if under_torchrun():  # the agent lives on
        launch = f"torchrun {socket.gethostname()} {os.getppid()} {os.environ['TORCHELASTIC_RUN_ID']}"
        return launch, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if "SLURM_JOB_ID" in os.environ:
        job = f"slurm {os.environ['SLURM_JOB_ID']} {os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
        return job, os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return f"process {os.getpid()}", False


def meet(fabric: Fabric) -> None:
    """Waits for all ranks. A signal that asks to stop ends the process meanwhile: there is no step to finish."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ASKING}
    fabric.launch()
    for number, handler in before.items():
        signal.signal(number, handler)


def leave_together() -> None:
    """Ends the process group before the interpreter does, which may abort while gloo's threads still run."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def first_error_only(fabric: Fabric, preemption: Preemption) -> Iterator[None]:
    """Keeps a rank quiet that fails because another rank did: that one has said why, and the launcher ends both."""
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception as error:
        if fabric.world_size == 1:
            raise
        lost = isinstance(error, torch.distributed.DistError) or LOST_CONTACT.search(str(error)) is not None
        if lost and preemption.requested is not None:  # the launcher has already asked this rank to end
            sys.exit(1)
        if lost or not fabric.is_global_zero:
            time.sleep(SECONDS_TO_BE_KILLED if lost else 3)
        if not lost:
            raise
        raise UserError(f"rank {fabric.global_rank} lost contact with another rank; see that rank's error") from error


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
