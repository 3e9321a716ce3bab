"""Training with --train.compile: the same losses, and no new graph for every new size of images."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.commands import Job, records
from tests.patching import patch

RUN = ("--preset", "debug", "--train.log-every", "1", "--train.epochs", "2", "--eval.attention-images", "2")
FEWER_EPOCHS = (
    *("--model.cross-attention", "conditional", "--loss.kind", "focal", "--optim.ema", "0.9"),
    *("--attn.decoder-cross", "sparsemax", "--attn.softmax-first", "0.5"),
)
SIZES = ("--data.scales", "48", "64", "80", "--data.shapes-train", "24", "--model.dropout", "0")


def without_code_generation() -> None:
    """Everything but the compiler's last stage, which takes minutes and a C++ compiler."""
    whole = nn.Module.compile
    patch(nn.Module, "compile", lambda *args, **kwargs: whole(*args, **kwargs, backend="aot_eager"))


@pytest.mark.parametrize(
    ("ranks", "model"),
    [
        (1, ()),
        pytest.param(2, (), marks=pytest.mark.slow),
        pytest.param(1, FEWER_EPOCHS, marks=pytest.mark.slow),
    ],
    ids=["one", "two ranks", "fewer epochs"],
)
def test_a_compiled_model_trains_alike_and_knows_sizes_that_vary(
    ranks: int, model: tuple[str, ...], tmp_path: Path
) -> None:
    losses = {}
    for name, flags, target in (("eager", (), None), ("compiled", ("--train.compile",), without_code_generation)):
        job = Job(
            *(*RUN, *SIZES, *model, *flags, "--train.batch-size", str(8 // ranks), "--train.run-dir", name),
            cwd=tmp_path,
            ranks=ranks,
            target=target,
            XDG_CACHE_HOME=str(tmp_path / "cache"),
        )
        assert job.wait() == [0] * ranks, job.text()
        assert "recompile_limit" not in job.text()  # PyTorch's warning, on any rank, that it gives a function up
        steps = [record for record in records(tmp_path / name) if "train/loss" in record]
        losses[name] = [record["train/loss"] for record in steps]
    assert len(losses["eager"]) == 6
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-3)
    assert steps[-1]["compiled_graphs"] <= 6  # in training and in evaluation: for the first size, and for all others
