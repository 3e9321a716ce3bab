"""Charts and figures: what their pixels and data say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fabric.analysis import figures
from detr_fabric.analysis.figures import comparison_figure, detection_figure, query_figure
from detr_fabric.analysis.heatmaps import color_scale, heat, scale_bar
from detr_fabric.analysis.maps import AttentionMaps
from detr_fabric.analysis.plots import COLORS, overview
from detr_fabric.analysis.statistics import AttentionStatistics, attention_statistics
from tests.analysis.small import MATCHER, batches, scenes, small_detr
from tests.patching import Patch

GREY = Image.new("RGB", (80, 40), (100, 100, 100))


def test_a_tile_shows_the_image_where_weights_are_zero_and_the_lightest_colour_at_the_largest() -> None:
    weights = torch.zeros(2, 4)
    weights[1, 3] = 0.2
    tile = np.asarray(heat(GREY, weights, [], color_scale(0.2)))
    height, width = tile.shape[0] // 2, tile.shape[1] // 4
    assert (tile[:height] == tile[0, 0]).all() and tile[0, 0].tolist() == [65, 65, 65]
    strongest = tile[height:, 3 * width :]
    assert (strongest == strongest[0, 0]).all() and strongest[0, 0].astype(int).sum() > 550


def test_zero_almost_zero_and_small_weights_look_different_and_equal_weights_alike_in_every_tile() -> None:
    scale = color_scale(0.5)
    first = np.asarray(heat(GREY, torch.tensor([[0.0, 1e-9, 1e-5, 1e-3]]), [], scale)).astype(int)
    second = np.asarray(heat(GREY, torch.tensor([[1e-3, 0.5]]), [], scale)).astype(int)
    cells = [first[5, 168 * k // 4 + 20] for k in range(4)]
    differences = [abs(a - b).max() for n, a in enumerate(cells) for b in cells[n + 1 :]]
    assert min(differences) > 20
    zero, nearly, small, _ = cells
    assert nearly[2] > nearly[0] + 20, "bluish"
    assert small.sum() < zero.sum(), "a small weight is dark, and no weight is not"
    assert second[5, 20].tolist() == cells[3].tolist()


def test_the_scale_bar_names_the_ends_of_the_scale() -> None:
    bar = scale_bar(color_scale(0.5))
    assert bar.size == (420, 60) and len(bar.getcolors(1 << 16) or []) > 100


def lines(statistics: AttentionStatistics, row: int, column: int) -> list[tuple[str, str, list[float]]]:
    """(colour, line style, values) of a chart's panel, heads' dots left out."""
    figure = overview([("a", statistics)])
    axis = figure.axes[3 * row + column]
    found = [(line.get_color(), line.get_linestyle(), [float(y) for y in line.get_ydata()]) for line in axis.lines]
    return [line for line in found if line[1] != "None"]


def test_the_overview_draws_the_means_over_heads_of_every_layer() -> None:
    statistics = attention_statistics(small_detr("sparsemax"), batches(scenes((64, 64)), 1), MATCHER)
    curves = statistics.curves()

    def means(measure: str, layers: int = 3) -> list[float]:
        return pytest.approx([curves[f"attention/decoder_cross/layer{layer}/{measure}"] for layer in range(layers)])

    assert lines(statistics, 0, 2) == [(COLORS[0], "-", means("zeros")), (COLORS[0], "--", means("near_zeros"))]
    assert lines(statistics, 3, 2) == [(COLORS[0], "-", means("gini"))]
    paibb, even = lines(statistics, 4, 2)
    assert paibb == (COLORS[0], "-", means("paibb")) and even[1:] == (
        "--",
        pytest.approx([curves["attention/box_area"]] * 2),
    )
    assert len(overview([("a", statistics)]).axes) == 5 * 3


def test_the_overview_has_a_row_for_learned_alphas_and_names_in_any_script() -> None:
    learned = attention_statistics(small_detr("entmax-learned"), batches(scenes((64, 64)), 1), MATCHER)
    figure = overview([("модель", learned), ("b", learned)])
    assert len(figure.axes) == 6 * 3
    assert [line.get_color() for line in figure.axes[12].lines if line.get_linestyle() == "-"] == [*COLORS[:2]]
    assert [text.get_text() for text in figure.axes[15].get_legend().get_texts()][:2] == ["модель", "b"]


def maps(name: str = "a", layers: int = 2, heads: int = 3, queries: int = 4) -> AttentionMaps:
    generator = torch.Generator().manual_seed(0)
    cross = torch.rand(layers, heads, queries, 4, 6, generator=generator).relu()
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6]]).expand(queries, 4)
    image = torch.full((3, 40, 60), 128, dtype=torch.uint8)
    scores, labels = torch.linspace(0.9, 0.6, queries), torch.arange(queries) % 2
    return AttentionMaps(name, "softmax", image, scores, labels, boxes, cross / 100, ["cat", "кошка"])


def tiles(patch: Patch) -> list[tuple[float, float]]:
    """Largest weight of every tile that is drawn from now on, and of its scale."""
    drawn: list[tuple[float, float]] = []
    draw = figures.heat

    def spy(image, weights, boxes, scale):  # type: ignore[no-untyped-def]
        drawn.append((float(weights.max()), scale.norm.vmax))
        return draw(image, weights, boxes, scale)

    patch(figures, "heat", spy)
    return drawn


def test_figures_have_a_tile_for_every_place_and_one_scale(patch: Patch) -> None:
    drawn = tiles(patch)
    query_figure(maps(), [0, 3], "image 1")
    assert len(drawn) == 2 * 2 * (1 + 3)
    assert {largest for _, largest in drawn} == {max(weight for weight, _ in drawn)}
    drawn.clear()
    detection_figure(maps(), [1], "image 1")
    assert len(drawn) == 2 + 3
    drawn.clear()
    truth = {"gt_labels": torch.tensor([0, 1]), "gt_boxes": torch.rand(2, 4)}
    one, other = (each._replace(**truth, matched={0: 2}) for each in (maps(), maps("b", layers=1, heads=2)))
    comparison_figure([one, other], [0, 1], "image 1")  # object 1 is matched by neither
    assert len(drawn) == (2 + 3) + (1 + 2) and len({largest for _, largest in drawn}) == 1


def test_a_figure_without_tiles_is_drawn_too() -> None:
    assert detection_figure(maps(), [], "no detection").width > 512
