"""The fused kernels on a real device: they agree there, take no memory for weights, and training says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detr_fabric.config import AttnConfig, Mapping
from detr_fabric.model.attention import Attention
from detr_fabric.model.kernels import agreement
from detr_fabric.model.kernels.agreement import DTYPES, FUSED, try_kernels
from tests.commands import Job

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(agreement, "_agreed", set())
    return torch.device("cuda", 0)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("mapping", sorted(FUSED))
@pytest.mark.parametrize("width", agreement.WIDTHS)
def test_kernels_agree_with_the_plain_computation(
    cuda: torch.device, mapping: Mapping, precision: str, width: int
) -> None:
    if precision == "bf16-mixed" and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this card does not compute in bfloat16")
    (line,) = try_kernels(AttnConfig(mapping, alpha=1.3), cuda, precision, width)
    print(line)
    assert "which agrees" in line


def test_training_by_the_kernels_takes_less_memory_than_one_matrix_of_weights(cuda: torch.device) -> None:
    attn = AttnConfig("sparsemax")
    assert "which agrees" in try_kernels(attn, cuda, "bf16-mixed", 32)[0]
    block = Attention(256, 8, attn, dropout=0.1).to(cuda)
    x = torch.randn(4, 1400, 256, device=cuda, requires_grad=True)
    for _ in range(2):  # the first pass compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            block(x, x, x).float().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * 4 * 8 * 1400 * 1400


def test_a_run_says_that_it_uses_the_kernels(cuda: torch.device, tmp_path: Path) -> None:
    args = ("--preset", "debug", "--model.heads", "2", "--train.accelerator", "cuda", "--train.max-steps", "2")
    job = Job(*args, "--attn.kind", "sparsemax", "--train.run-dir", "run", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert job.wait() == [0] and "attn    fused kernel for heads 16 wide, which agrees" in job.text(), job.text()
