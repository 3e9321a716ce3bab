"""bfloat16 only where the card computes in it, and TF32 where the user allows it, both said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from detr_fabric.config import TF32
from detr_fabric.runtime.arithmetic import allow_tf32, arithmetic, computes_in_bf16
from detr_fabric.runtime.launch import _device_type

CUDA = torch.device("cuda")


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """GPUs of these generations (7: emulates bfloat16) seem to be there."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(major=found[i]))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: pytest.fail("asks of device 0 alone"))
    return found


@pytest.mark.parametrize(
    ("generations", "ranks", "expected"),
    [([8], 1, "bf16-mixed"), ([7], 1, "32-true"), ([8, 7], 2, "32-true"), ([9, 7], 1, "bf16-mixed")],
)
def test_bf16_is_the_default_only_where_every_card_in_use_computes_in_it(
    cards: list[int], generations: list[int], ranks: int, expected: str
) -> None:
    cards += generations
    assert _device_type("auto", None, ranks) == (True, expected)


def test_emulated_bf16_is_said_where_it_was_asked_for(cards: list[int]) -> None:
    cards += [7]
    assert not computes_in_bf16(1)
    assert "which Tesla T4 only emulates: --train.precision 16-mixed" in arithmetic(CUDA, "bf16-mixed", "convolutions")
    cards[0] = 8
    assert arithmetic(CUDA, "bf16-mixed", "convolutions") == "cuda in bf16-mixed"
    assert arithmetic(torch.device("cpu"), "32-true", "convolutions") == "cpu in 32-true"


@pytest.mark.filterwarnings("ignore:Please use the new API")
@pytest.mark.parametrize(
    ("where", "convolutions", "products", "words"),
    [
        ("never", False, False, "no TF32"),
        ("convolutions", True, False, "TF32 in convolutions"),
        ("everywhere", True, True, "TF32 everywhere"),
    ],
)
def test_tf32_is_where_it_was_allowed_and_is_said(where: TF32, convolutions: bool, products: bool, words: str) -> None:
    allow_tf32(where)
    found = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    allow_tf32("convolutions")  # PyTorch's default, and ours
    assert found == (convolutions, products)
    assert f"cuda in 32-true with {words} (--train.tf32)" == arithmetic(CUDA, "32-true", where)
