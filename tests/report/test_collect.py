"""What the page shows of run folders: numbers of the logs, hours, marks, the settings that differ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from detr_fabric.config import AttnConfig
from detr_fabric.errors import UserError
from detr_fabric.report.charts import CHARTS
from detr_fabric.report.collect import collect
from detr_fabric.report.records import read_run, thinned
from detr_fabric.report.runs import find_runs
from tests.report.folders import FIGURES, RECORDS, START, evaluation, training, write_run


def collected(*named: Path) -> dict[str, Any]:
    return collect([read_run(run) for run in find_runs([str(path) for path in named])])


def lines(content: dict[str, Any], title: str) -> dict[tuple[int, str, str], list[float | None]]:
    """(run, style, label) → values of a chart."""
    (chart,) = (chart for chart in content["charts"] if chart["title"] == title)
    return {(line["run"], line["style"], line["label"]): line["values"] for line in chart["series"]}


def test_curves_are_the_values_of_the_log(tmp_path: Path) -> None:
    content = collected(write_run(tmp_path, "a", RECORDS))
    assert lines(content, "Loss") == {
        (0, "main", "training"): [1.0, 0.5, 0.333333],
        (0, "dashed", "validation"): [1.0, 1.0],
    }
    assert lines(content, "Classification loss") == {
        (0, "main", "training"): [0.1, 0.05, 0.0333333],
        (0, "layer", "layer 0"): [0.2, 0.1, 0.0666667],
    }
    assert lines(content, "AP") == {(0, "main", ""): [0.25, 0.125]}
    assert lines(content, "Share of weights that are 0") == {
        (0, "main", "mean"): [0.1, 0.1],
        (0, "layer", "layer 0"): [0.0, 0.0],
        (0, "layer", "layer 1"): [0.2, 0.2],
    }
    titles = [chart["title"] for chart in content["charts"]]
    assert "AP of small objects" not in titles  # -1: there are none


def test_every_name_that_training_logs_is_in_a_chart_or_known_to_be_left_out() -> None:
    """So that a new logged value is not forgotten here: the list at the top of the recorder."""
    logged = [
        *(
            "train/loss",
            "train/loss_ce",
            "train/loss_bbox_0",
            "train/loss_giou",
            "val/loss",
            "val/loss_ce",
            "grad_norm",
        ),
        *("lr/transformer", "lr/backbone", "lr/alpha", "images_per_second", "data_wait", "memory_gb", "skipped_images"),
        *("val/AP", "val/AP50", "val/AP75", "val/APs", "val/APm", "val/APl", "train/class_error", "val/class_error"),
        *("attention/encoder_self/layer0/gini", "attention/decoder_cross/layer5/paibb", "alpha/decoder_self/layer3"),
    ]
    patterns = [curve.key for charts in CHARTS.values() for curves in charts.values() for curve in curves]
    assert [name for name in logged if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []


def test_hours_are_steps_by_images_a_second_and_the_seconds_of_evaluations(tmp_path: Path) -> None:
    run = read_run(find_runs([str(write_run(tmp_path, "a", RECORDS))])[0])
    # 10 steps of 8 images at 4 images a second are 20 s; an evaluation is 36 s
    assert [round(record["hours"] * 3600) for record in run.training] == [20, 76, 96]
    assert [round(record["hours"] * 3600) for record in run.evaluations] == [56, 132]


def test_the_row_has_the_scores_of_the_best_evaluation(tmp_path: Path) -> None:
    row = collected(write_run(tmp_path, "a", RECORDS, AttnConfig(decoder_cross="sparsemax")))["runs"][0]["row"]
    assert (row["AP"], row["AP50"], row["AP75"], row["APs"], row["best step"], row["steps"]) == (
        *(0.25, 0.5, None, None),
        *(10, 30),
    )
    assert row["mapping"] == "softmax / sparsemax" and row["backbone"] == "resnet50"
    assert (row["parameters"], row["commit"], row["device"]) == (1234567, START["commit"], "cpu")
    assert row["images/s"] == 4.0 and round(row["hours"] * 3600) == 132


def test_marks_say_where_the_mapping_took_over_the_run_was_resumed_and_steps_were_dropped(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", RECORDS, AttnConfig("entmax15"), softmax_steps=15)
    with (run / "starts.jsonl").open("a") as file:
        file.write(json.dumps(START | {"step": 20, "softmax_steps": 15}) + "\n")
    marks = collected(run)["runs"][0]["marks"]
    assert [(mark["mark"], mark["step"], mark["epoch"]) for mark in marks] == [
        ("resumed", 20, 2.0),
        ("step dropped", 25, 2.5),
        ("softmax → entmax15", 15, 1.5),
    ]
    assert round(marks[2]["hours"] * 3600) == 66  # between step 10 with its evaluation, 56 s, and step 20, 76 s


def test_a_run_of_an_earlier_version_and_a_torn_line_are_read(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", RECORDS, AttnConfig("sparsemax"))
    (run / "starts.jsonl").unlink()
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "epo')
    content = collected(run)["runs"][0]
    assert content["row"]["steps"] == 30 and content["row"]["commit"] is None
    assert [mark["step"] for mark in content["marks"]] == [25, 15]  # half of 30 steps with softmax


def test_only_the_settings_that_differ_are_shown(tmp_path: Path) -> None:
    one, other = write_run(tmp_path, "a", RECORDS), write_run(tmp_path, "b", RECORDS, AttnConfig("relu"), lr=2e-4)
    assert collected(one, other)["settings"] == {
        "heads": [0, 1],
        "rows": [
            {"name": "attn.kind", "values": ["softmax", "relu"]},
            {"name": "optim.lr", "values": ["0.0001", "0.0002"]},
        ],
    }
    config = json.loads((other / "config.json").read_text())
    config["attn"]["temperature"] = 2
    (other / "config.json").write_text(json.dumps(config))
    assert {"name": "attn.temperature", "values": [None, "2"]} in collected(one, other)["settings"]["rows"]


def test_of_a_single_run_the_settings_that_are_not_the_default_are_shown(tmp_path: Path) -> None:
    shown = collected(write_run(tmp_path, "a", RECORDS, lr=2e-4))["settings"]
    assert shown["heads"] == ["default", "this run"]
    assert {"name": "optim.lr", "values": ["0.0001", "0.0002"]} in shown["rows"]
    assert not any(row["name"] == "model.backbone" for row in shown["rows"])


def test_classes_are_those_of_the_best_evaluation_side_by_side(tmp_path: Path) -> None:
    other = [evaluation(10, 0.5, **{"val/AP_class/dog": 0.75, "val/AP_class/emu": 0.25})]
    content = collected(write_run(tmp_path, "a", RECORDS), write_run(tmp_path, "b", other))
    assert content["classes"] == [
        {"name": "cat", "values": [0.5, None]},
        {"name": "dog", "values": [0.0, 0.75]},
        {"name": "emu", "values": [None, 0.25]},
    ]


def test_figures_are_those_of_the_last_evaluation_where_it_has_them(two_runs: list[Path], tmp_path: Path) -> None:
    torn = write_run(tmp_path, "torn", RECORDS)
    (torn / "evaluation.json").write_text('{"step": 30, "F1"')
    assert collected(*two_runs, torn)["figures"] == [FIGURES, None, None]


def test_many_records_become_means_of_neighbours() -> None:
    records = [training(step, hours=step / 100) for step in range(1, 1001)]
    thin = thinned(records, most=100)
    assert len(thin) == 100 and [record["step"] for record in thin[:2]] == [10, 20]
    assert thin[0]["train/loss"] == pytest.approx(sum(10 / step for step in range(1, 11)) / 10)
    assert thinned(records, most=1000) == records


def test_runs_are_found_by_folder_by_checkpoint_and_in_a_folder_of_runs_each_once(tmp_path: Path) -> None:
    study = tmp_path / "study"
    one, other = write_run(study, "a", RECORDS), write_run(study, "b", RECORDS)
    (one / "best.ckpt").touch()
    (one / "last.ckpt").touch()
    found = find_runs([str(study), str(one), str(one / "last.ckpt")])
    assert [(run.folder, run.checkpoint) for run in found] == [
        (one, one / "best.ckpt"),
        (other, None),
        (one, one / "last.ckpt"),
    ]
    assert len({run.name for run in found}) == 3
    elsewhere = write_run(tmp_path / "more", "a", RECORDS)
    assert [run.name for run in find_runs([str(one), str(elsewhere)])] == ["study/a", "more/a"]


@pytest.mark.parametrize(("name", "words"), [("absent", "no such file"), ("", "holds no run")])
def test_what_is_no_run_is_refused_by_name(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_runs([str(tmp_path / name)])


def test_values_that_are_not_finite_and_files_that_are_no_settings_do_not_break_the_page(tmp_path: Path) -> None:
    gaps = [
        training(10, **{"train/loss": None}),
        training(20, grad_norm=float("nan")),
        evaluation(20, 0.5),
        training(30),
    ]
    run = write_run(
        tmp_path, "a", [*gaps, evaluation(30, 0.5, **{"val/AP": None}), training(40, images_per_second=None)]
    )
    content = collected(run)
    json.dumps(content, allow_nan=False)
    assert lines(content, "Loss")[0, "main", "training"] == [None, 0.5, 0.333333]
    assert lines(content, "Gradient norm before clipping")[0, "main", ""] == [0.5, None, 0.5]
    for wrong in ("[]", "{", '{"attn": 1}'):
        (run / "config.json").write_text(wrong)
        with pytest.raises(UserError, match="can't be read"):
            collected(run)
