"""A GPU's training step simulated: how many operators it tells the GPU of, and how much memory it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from detr_fabric.benchmark.simulate import simulate
from detr_fabric.benchmark.step import model_config
from detr_fabric.config import AttnConfig, Mapping

MOST_OPERATORS = 1673  # of ResNet-50's step; it was 2,444 before attention's inputs were projected together


def test_a_training_step_tells_the_gpu_of_no_more_operators_than_it_did() -> None:
    found = simulate(model_config("resnet50"), AttnConfig(), 2, (800, 1333))
    assert found.operators.total() <= MOST_OPERATORS
    assert found.operators["convolution"] == 54 and found.operators["_fused_adamw_"] == 2  # it is the whole step
    assert found.operators["max_pool2d_with_indices"] == 1  # and one step


SMALL = replace(model_config("resnet18"), enc_layers=2, dec_layers=1)


def test_operators_do_not_depend_on_the_size_of_the_images() -> None:
    small, large = (simulate(SMALL, AttnConfig(), 2, size) for size in ((64, 96), (800, 1333)))
    assert small.operators == large.operators and small.peak < large.peak


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
def test_weights_of_attention_take_memory_only_where_they_are_kept_for_the_backward_pass(kind: Mapping) -> None:
    def peak(recompute: bool) -> int:
        return simulate(SMALL, AttnConfig(kind, recompute=recompute), 2, (800, 800)).peak

    weights = 2 * 2 * 8 * 625**2  # of the encoder: layers, images, heads, queries x keys
    more = peak(False) - peak(True)
    assert more == 0 if kind == "softmax" else more > 3 * weights  # one layer of two is computed again at a time
