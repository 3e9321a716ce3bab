"""Tables for papers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from detr_fabric.analysis.tables import Table, summarize

TABLE = Table(
    ("run_name", "seeds"),
    {"AP50": 3, "alpha": 2, "keys": 1},
    [
        (["soft_max", "3"], [summarize([0.9, 0.92, 0.94]), None, None]),
        (["sparsemax", "1"], [summarize([0.75]), None, summarize([2.96])]),
        (["top & k", "0"], [summarize([]), None, None]),
    ],
)


def test_a_table_holds_mean_and_sample_deviation_a_dash_where_nothing_is_and_no_empty_column() -> None:
    assert TABLE.text().splitlines() == [
        "run_name   seeds  AP50           keys",
        "soft_max   3      0.920 ± 0.020  –",
        "sparsemax  1      0.750          3.0",
        "top & k    0      –              –",
    ]
    assert TABLE.markdown().splitlines()[:3] == [
        "| run_name | seeds | AP50 | keys |",
        "|---|---|---|---|",
        "| soft_max | 3 | 0.920 ± 0.020 | – |",
    ]


def test_latex_has_a_column_for_each_measure_and_escapes_signs() -> None:
    lines = TABLE.latex().splitlines()
    assert lines[0] == r"\begin{tabular}{llcc}" and lines[-1] == r"\end{tabular}"
    assert lines[1:4] == [
        r"run\_name & seeds & AP50 & keys \\",
        r"\hline",
        r"soft\_max & 3 & 0.920 $\pm$ 0.020 & -- \\",
    ]
    assert lines[5] == r"top \& k & 0 & -- & -- \\"


def test_csv_holds_all_digits_and_nothing_where_nothing_is(tmp_path: Path) -> None:
    TABLE.write(tmp_path, "table")
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert float(rows[0]["AP50 mean"]) == pytest.approx(0.92, abs=1e-12)
    assert float(rows[0]["AP50 std"]) == pytest.approx(0.02, abs=1e-12)
    assert rows[1]["keys mean"] == "2.96" and rows[1]["keys std"] == "" and rows[2]["AP50 mean"] == ""
    assert (tmp_path / "table.tex").read_text() == TABLE.latex()
    assert (tmp_path / "table.md").read_text() == TABLE.markdown()
