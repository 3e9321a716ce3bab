"""What the table of a study takes from records."""

from __future__ import annotations

from typing import Any

import pytest

from detr_fabric.config import Config, TrainConfig
from detr_fabric.study.table import figure, figure_of_steps, measured, table_of

RECORDS: list[dict[str, Any]] = [
    {"step": 1, "images_per_second": 4.0},
    {"step": 2, "images_per_second": 8.0},
    {"step": 2, "val/AP": 0.1, "val/AP50": 0.2},
    {"step": 3, "images_per_second": 16.0},
    {"step": 4, "images_per_second": 32.0, "alpha/decoder_cross/layer0": 9.0},
    {
        **{"step": 4, "val/AP": 0.3, "val/AP50": 0.5, "attention/box_area": 0.1},
        **{f"attention/decoder_cross/layer{layer}/zeros": 0.8 + 0.1 * layer for layer in (0, 1)},
        **{"attention/decoder_cross/layer0/near_zeros": 7.0, "attention/encoder_self/layer0/zeros": 7.0},
        **{f"attention/decoder_cross/layer{layer}/support": 3.0 + layer for layer in (0, 1)},
        "alpha/decoder_cross/layer0/head0": 1.5,
        "alpha/decoder_cross/layer0/head1": 1.7,
        "alpha/encoder_self/layer0/head0": 7.0,
    },
]


def test_a_run_is_measured_by_its_last_evaluation_and_its_last_speeds() -> None:
    config = Config(train=TrainConfig(batch_size=4, accumulate=2, devices=2))
    expected = {"AP50": 0.5, "AP": 0.3, "zeros": 0.85, "keys": 3.5, "alpha": 1.6, "s/step": 16 / 32}
    expected |= {"AP50@2": 0.2, "AP50@4": 0.5}
    assert measured(RECORDS, config) == pytest.approx(expected)


def test_a_configuration_has_a_row_also_before_its_first_run_is_done() -> None:
    table = table_of({"a": [{"AP50": 0.5}, {"AP50": 0.7, "keys": 2.0}], "b": []})
    assert [line.split() for line in table.text().splitlines()[1:]] == [
        ["a", "2", "0.600", "±", "0.141", "2.0"],
        ["b", "0", "–", "–"],
    ]


def test_configurations_that_are_numbers_get_a_figure_of_what_is_done() -> None:
    runs = {"0.0": [{"AP50": 0.4, "AP": 0.1, "keys": 3.0}], "0.5": [{"AP50": 0.9}, {"AP50": 0.8}], "0.75": []}
    scores, keys = figure(table_of(runs), "fraction").axes
    assert [bar.get_label() for bar in scores.containers] == ["AP50", "AP"]
    (line, _, (bars,)) = scores.containers[0]
    assert line.get_xdata().tolist() == [0, 0.5] and line.get_ydata().tolist() == pytest.approx([0.4, 0.85])
    assert [float(high - low) for (_, low), (_, high) in bars.get_segments()] == pytest.approx([0, 0.02**0.5 / 1])
    assert keys.containers[0][0].get_xdata().tolist() == [0] and scores.get_xlabel() == "fraction"


def test_a_study_that_names_steps_has_columns_and_a_figure_of_them() -> None:
    runs = {"a": [{"AP50": 0.7, "AP50@2": 0.2, "AP50@4": 0.7}, {"AP50": 0.9, "AP50@2": 0.4, "AP50@4": 0.9}], "b": []}
    table = table_of(runs, (2, 4))
    assert table.text().splitlines()[0].split() == ["configuration", "seeds", "AP50@2", "AP50@4", "AP50"]
    (axis,) = figure_of_steps(table, (2, 4)).axes
    line = axis.containers[0][0]
    assert line.get_xdata().tolist() == [2, 4] and line.get_ydata().tolist() == pytest.approx([0.3, 0.8])
