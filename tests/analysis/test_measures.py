"""Measures of attention maps, against slow references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detr_fabric.analysis import measures
from detr_fabric.boxes import cxcywh_to_xyxy


def sparse_map(heads: int = 3, queries: int = 5, keys: int = 12) -> Tensor:
    """Rows that sum to 1, some weights exactly 0, some tiny."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(heads, queries, keys, generator=generator)
    weights = scores.relu() + 1e-8 * (scores < -1.5)
    return weights / weights.sum(-1, keepdim=True)


def test_measures_equal_slow_references() -> None:
    weights = sparse_map()
    for head, rows in enumerate(weights.tolist()):
        flat = [w for row in rows for w in row]
        assert measures.zeros(weights)[head].item() == pytest.approx(sum(w == 0 for w in flat) / len(flat))
        assert measures.near_zeros(weights)[head].item() == pytest.approx(sum(w <= 1e-6 for w in flat) / len(flat))
        support = [sum(w != 0 for w in row) for row in rows]
        assert measures.support(weights)[head].item() == pytest.approx(sum(support) / len(rows))
        entropy = [-sum(w * math.log(w) for w in row if w > 0) for row in rows]
        assert measures.entropy(weights)[head].item() == pytest.approx(sum(entropy) / len(rows), abs=1e-5)
        differences = sum(abs(a - b) for a in flat for b in flat)  # the definition as a mean absolute difference
        gini = differences / (2 * len(flat) * sum(flat))
        assert measures.gini(weights)[head].item() == pytest.approx(gini, abs=1e-6)
        by_row = [sum(abs(a - b) for a in row for b in row) / (2 * len(row) * sum(row)) for row in rows]
        assert measures.gini_rows(weights)[head].item() == pytest.approx(sum(by_row) / len(rows), abs=1e-6)
    assert (measures.near_zeros(weights) > measures.zeros(weights)).any()  # the map has both kinds


def test_measures_of_even_single_and_absent_weights() -> None:
    heads, queries, keys = 2, 3, 16
    even = torch.full((heads, queries, keys), 1 / keys)
    single = torch.zeros(heads, queries, keys).index_fill_(2, torch.tensor([5]), 1.0)
    nothing = torch.zeros(heads, queries, keys)
    expected = {
        measures.zeros: (0, 15 / 16, 1),
        measures.near_zeros: (0, 15 / 16, 1),
        measures.support: (16, 1, 0),
        measures.entropy: (math.log(16), 0, 0),
        measures.gini: (0, 1 - 1 / keys, 0),
        measures.gini_rows: (0, 1 - 1 / keys, 0),
    }
    for measure, values in expected.items():
        for weights, value in zip((even, single, nothing), values, strict=True):
            torch.testing.assert_close(measure(weights), torch.full((heads,), float(value)), rtol=0, atol=1e-6)


def test_gini_is_of_the_whole_map_so_rows_without_mass_count_as_sparse() -> None:
    weights = torch.zeros(1, 4, 8)
    weights[0, 0] = 1 / 8
    assert measures.gini(weights).item() == pytest.approx(3 / 4)
    assert measures.gini_rows(weights).item() == 0


def test_entropy_of_rows_that_do_not_sum_to_one_is_that_of_their_shares() -> None:
    weights = sparse_map()
    torch.testing.assert_close(measures.entropy(7 * weights), measures.entropy(weights))


def test_cover_is_the_exact_area_of_each_cell_inside_the_box() -> None:
    h, w = 3, 5
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.31, 0.62, 0.05, 0.07], [0.9, 0.1, 0.6, 0.5], [0.5, 0.5, 1.0, 1.0]])
    covered = measures.cover(boxes, h, w)
    for (cx, cy, bw, bh), cells in zip(boxes.tolist(), covered.view(-1, h, w).tolist(), strict=True):
        for y in range(h):
            for x in range(w):
                across = min((x + 1) / w, cx + bw / 2) - max(x / w, cx - bw / 2)
                down = min((y + 1) / h, cy + bh / 2) - max(y / h, cy - bh / 2)
                assert cells[y][x] == pytest.approx(max(across, 0) * max(down, 0) * h * w, abs=1e-5)
    assert covered[1].sum().item() == pytest.approx(0.05 * 0.07 * h * w, abs=1e-5)  # smaller than a cell, yet counted


def test_share_inside_is_the_mass_on_covered_cells() -> None:
    weights = sparse_map(heads=2, queries=3, keys=4 * 6)
    boxes = torch.tensor([[0.4, 0.5, 0.5, 0.6], [0.7, 0.3, 0.2, 0.1], [0.5, 0.5, 1.0, 1.0]])
    shares = measures.share_inside(weights, measures.cover(boxes, 4, 6))
    assert shares.shape == (2, 3)
    for head in range(2):
        for pair, (left, top, right, bottom) in enumerate(cxcywh_to_xyxy(boxes).tolist()):
            # Each cell as 60 × 60 points: these boxes' edges fall between points.
            inside = 0.0
            for cell, weight in enumerate(weights[head, pair].tolist()):
                y, x = divmod(cell, 6)
                down = sum(top <= (y + (k + 0.5) / 60) / 4 <= bottom for k in range(60)) / 60
                across = sum(left <= (x + (k + 0.5) / 60) / 6 <= right for k in range(60)) / 60
                inside += weight * down * across
            assert shares[head, pair].item() == pytest.approx(inside, abs=0.01)
    torch.testing.assert_close(shares[:, 2], torch.ones(2))
    even = torch.full((2, 3, 24), 0.5)  # rows that don't sum to 1 count by their shares
    torch.testing.assert_close(measures.share_inside(even, measures.cover(boxes, 4, 6))[0], boxes[:, 2:].prod(-1))


def test_share_inside_enlarged_is_the_mass_of_the_enlarged_map_in_the_box() -> None:
    """Boxes whose edges fall between pixels, so that a pixel is inside or it is not; bilinear by its definition."""
    cells, pixels = (3, 5), (20, 30)
    weights = sparse_map(heads=1, queries=4, keys=15)[0]
    corners = torch.tensor([[3.0, 2, 17, 11], [0, 0, 30, 20], [29, 19, 30, 20], [10, 5, 11, 20]])  # xyxy in pixels
    boxes = torch.cat([corners[:, :2] + corners[:, 2:], 2 * (corners[:, 2:] - corners[:, :2])], 1) / 2
    shares = measures.share_inside_enlarged(weights, boxes / torch.tensor([30, 20, 30, 20]), cells, pixels)
    for pair, (left, top, right, bottom) in enumerate(corners.tolist()):
        rows = weights[pair].view(cells).tolist()
        inside = everywhere = 0.0
        for y in range(20):
            for x in range(30):
                v, u = max((y + 0.5) * 3 / 20 - 0.5, 0), max((x + 0.5) * 5 / 30 - 0.5, 0)
                i, j = int(v), int(u)
                below, beside = min(i + 1, 2), min(j + 1, 4)
                upper = (1 - u + j) * rows[i][j] + (u - j) * rows[i][beside]
                lower = (1 - u + j) * rows[below][j] + (u - j) * rows[below][beside]
                value = (1 - v + i) * upper + (v - i) * lower
                everywhere += value
                inside += value * (left <= x < right and top <= y < bottom)
        assert shares[pair].item() == pytest.approx(inside / everywhere, abs=1e-6)
    half = torch.tensor([[0.25, 0.5, 0.5, 1.0]])
    even = torch.full((1, 15), 0.5)
    assert measures.share_inside_enlarged(even, half, cells, pixels).item() == pytest.approx(0.5)
    assert measures.share_inside_enlarged(0 * even, half, cells, pixels).item() == 0


def test_crop_padding_keeps_exactly_the_pairs_of_real_tokens() -> None:
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, :3, :2] = False
    mask[1, :1, :4] = False
    weights = torch.arange(2 * 2 * 12 * 12.0).view(2, 2, 12, 12)
    both = measures.crop_padding(weights, mask, queries_too=True)
    keys = measures.crop_padding(weights, mask, queries_too=False)
    for image in range(2):
        real = [token for token in range(12) if not mask[image].flatten()[token]]
        for head in range(2):
            expected = [[weights[image, head, q, k].item() for k in real] for q in range(12)]
            assert keys[image][head].tolist() == expected
            assert both[image][head].tolist() == [expected[q] for q in real]
