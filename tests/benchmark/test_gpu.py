"""The script of all that needs a GPU: it says so where there is none, and prints one table of whatever it could run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detr_fabric.benchmark import attention, gpu, step, train
from detr_fabric.benchmark.measure import PartResult
from tests.patching import Patch

TINY = ("--accelerator", "cpu", "--quick")


def test_without_a_gpu_it_ends_with_2_and_one_sentence(patch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    patch(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: no GPU is visible")


def test_a_part_that_fails_is_a_line_of_the_table_beside_the_others(
    patch: Patch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object, **settings: object) -> PartResult:
        raise RuntimeError("out of\nmemory")

    patch(gpu, "gpu_tests", lambda quick: [{"case": "pytest -m gpu", "name": "3 passed"}])
    patch(gpu, "quickstart", lambda device, quick: [{"case": "quickstart", "name": "ours", "AP50": 0.95}])
    patch(step, "measure", fails)
    patch(attention, "measure", lambda *args, **settings: PartResult([{"case": "self", "name": "SDPA", "ms": 1.0}]))
    patch(train, "measure", lambda *args: PartResult([{"case": "resnet18", "name": "ours", "images/s": 90.0}]))
    with pytest.raises(SystemExit) as ended:
        gpu.main([*TINY, "--json", str(tmp_path / "a.json")])
    assert ended.value.code == 1
    rows = {row["case"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert rows["step: step"]["name"] == "failed: RuntimeError: out of memory"
    assert rows["quickstart: quickstart"]["AP50"] == 0.95 and rows["train: resnet18"]["images/s"] == 90
    said = capsys.readouterr().out
    assert all(case in said for case in rows)


@pytest.mark.slow
def test_the_whole_script_runs_at_tiny_sizes_on_a_cpu(tmp_path: Path) -> None:
    gpu.main([*TINY, "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {row["case"].split(":")[0] for row in rows} == {
        "tests", "step", "waits", "attention", "train", "quickstart"
    }  # fmt: skip
