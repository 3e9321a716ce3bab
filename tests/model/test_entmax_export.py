"""entmax as exported graphs compute it: a fixed number of operations, with the answers of the steps in entmax.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detr_fabric.model.entmax import entmax
from tests.model.test_mappings import slow_rows
from tests.patching import Patch


def rows(width: int) -> Tensor:
    """(2, 20, width), from flat to steep, with forbidden keys and a row of them alone."""
    scores = torch.randn(2, 20, width, generator=torch.Generator().manual_seed(width))
    scores *= torch.logspace(-3, 2, 20)[:, None]
    scores[1, :, (width + 1) // 2 :] = -math.inf
    scores[0, 7] = -math.inf
    return scores


@pytest.mark.parametrize("alpha", [0.2, 0.7, 1.001, 1.25, 1.5, 1.97, 2.0])
def test_answers_are_those_of_the_steps_also_in_rows_that_need_many(alpha: float, patch: Patch) -> None:
    every = [rows(width) for width in (1, 2, 3, 60, 1000)] + [slow_rows()]
    expected = [(entmax(scores, alpha), entmax(scores, torch.tensor(alpha))) for scores in every]
    patch(torch.compiler, "is_exporting", lambda: True)
    for scores, (number, tensor) in zip(every, expected, strict=True):
        torch.testing.assert_close(entmax(scores, alpha), number, atol=3e-5, rtol=0)
        torch.testing.assert_close(entmax(scores, torch.tensor(alpha)), tensor, atol=3e-5, rtol=0)


@pytest.mark.parametrize("alpha, most", [(2.0, 30), (1.5, 40), (1.25, 150)])
def test_a_graph_has_few_nodes(alpha: float, most: int) -> None:
    class Mapped(torch.nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return entmax(scores, alpha)

    with torch.no_grad():
        program = torch.export.export(Mapped(), (rows(9),), strict=False)
    assert len(program.graph.nodes) <= most
