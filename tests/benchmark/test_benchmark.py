"""The benchmark: every part runs small, its record has the documented keys, and a missing baseline is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from detr_fabric.benchmark import loss
from detr_fabric.benchmark.__main__ import main
from detr_fabric.benchmark.measure import PartResult
from tests.patching import Patch


@pytest.mark.parametrize("part", ["loss", "data", "eval", "inference", "step"])
def test_each_part_prints_a_table_and_writes_a_record(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([part, "--quick", "--accelerator", "cpu", "--json", str(tmp_path / "a.json")])
    record = json.loads((tmp_path / "a.json").read_text())
    assert record.keys() == {"date", "commit", "machine", "versions", "quick", "parts"}
    assert record["machine"]["threads"] == 1 and record["versions"]["torch"]
    rows = record["parts"][part]["rows"]
    assert {"case", "name", "ms", "ratio", "rounds"} <= rows[0].keys()
    assert all(row["ratio"] == 1 for row in rows if row["name"] == "ours") and len({row["name"] for row in rows}) > 1
    assert rows[0]["case"] in capsys.readouterr().out


def test_whole_training_is_measured_by_its_own_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--quick", "--accelerator", "cpu", "--json", str(tmp_path / "a.json")])
    (row,) = json.loads((tmp_path / "a.json").read_text())["parts"]["train"]["rows"]
    assert row["rounds"] == 2 and 0 <= row["data wait"] <= 1 and row["images/s"] * row["ms"] == pytest.approx(1000)
    assert row["case"] in capsys.readouterr().out


@pytest.mark.parametrize("part", ["loss", "inference", "step", "start"])
def test_a_missing_peer_is_named_and_left_out(
    part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    main([part, "--quick", "--accelerator", "cpu", "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())["parts"][part]
    assert found["missing"] == ["transformers"]
    assert not any("transformers" in row["name"] for row in found["rows"])
    assert "transformers is not installed" in capsys.readouterr().out


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["speed"])
    assert ended.value.code == 2 and "'speed'" in capsys.readouterr().err


def test_a_part_that_fails_is_one_line_beside_the_figures_of_the_others(
    patch: Patch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*args: object) -> PartResult:
        raise RuntimeError("out of\nmemory")

    patch(loss, "measure", measure)
    with pytest.raises(SystemExit) as ended:
        main(["loss", "eval", "--quick", "--accelerator", "cpu", "--json", str(tmp_path / "a.json")])
    assert ended.value.code == 1
    assert "\nloss failed: RuntimeError: out of memory\n" in (said := capsys.readouterr().out)
    parts = json.loads((tmp_path / "a.json").read_text())["parts"]
    assert parts["loss"] == {"rows": [], "missing": [], "failed": "RuntimeError: out of memory"}
    assert parts["eval"]["rows"][0]["case"] in said


def test_the_memory_of_presets_needs_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["memory", "--quick", "--accelerator", "cpu", "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())["parts"]["memory"]["rows"]
    assert [row["name"] for row in rows] == [
        "softmax, simulated", "weights recomputed, simulated", "weights kept, simulated"
    ]  # fmt: skip
    assert all(0.1 < row["gib"] < 1 for row in rows) and rows[0]["case"] in capsys.readouterr().out
