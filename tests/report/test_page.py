"""The page: self-contained, escaped, small; and that it never ends a training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from detr_fabric.errors import UserError
from detr_fabric.report import write
from detr_fabric.report.page import OURS, UPLOT, page, read
from detr_fabric.report.settings import Settings
from detr_fabric.report.write import report, report_after_training
from tests.patching import Patch
from tests.report.folders import RECORDS, evaluation, training, write_run

HOSTILE = "</script><img src=x onerror=alert(1)>&lt;\u2028<!--"


def embedded(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    content = json.loads(found[1])
    assert isinstance(content, dict)
    return content


def test_hostile_names_of_runs_and_classes_stay_data(tmp_path: Path) -> None:
    hostile = [*RECORDS, evaluation(40, 0.5, **{f"val/AP_class/{HOSTILE}": 0.5})]
    run = write_run(tmp_path, "a<b>&", hostile)
    report(tmp_path / "page.html", Settings((str(run),), images=0))
    html = (tmp_path / "page.html").read_text()
    content = embedded(html)
    assert content["classes"][0]["name"] == HOSTILE and content["runs"][0]["name"] == "a<b>&"
    assert "onerror=alert" not in html.replace("\\u003cimg src=x onerror=alert(1)", "") and "a<b>" not in html


def test_our_scripts_write_text_as_text() -> None:
    for name in OURS:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", read(name)), name


def test_the_page_names_no_other_file_and_allows_no_request(tmp_path: Path) -> None:
    html = page({"runs": []})
    for part in UPLOT + OURS:
        assert f"/*{part}*/" not in html
    assert "default-src 'none'" in html and "/*data*/" not in html
    assert not re.search(r"""(?:src|href)=["']?(?!data:)[\w./]""", html.replace('href="#', ""))
    assert "Copyright (c) 2022 Leon Sorokin" in html  # its licence travels with uPlot


@pytest.mark.process
def test_three_long_runs_without_attention_stay_below_2_mb(tmp_path: Path) -> None:
    long = [training(step, **{f"train/loss_bbox_{n}": 0.123456789 for n in range(5)}) for step in range(1, 3000)]
    runs = [write_run(tmp_path, name, [*long, evaluation(3000, 0.4)]) for name in "abc"]
    report(tmp_path / "page.html", Settings(tuple(map(str, runs)), images=0))
    assert (tmp_path / "page.html").stat().st_size < 2**21


def test_a_report_that_fails_after_training_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], patch: Patch
) -> None:
    run = write_run(tmp_path, "a", RECORDS)
    report_after_training(run, attention=False)
    assert (run / "report.html").exists() and f"report  {run / 'report.html'}" in capsys.readouterr().out

    def fails(*_: object) -> None:
        raise MemoryError("no room")

    patch(write, "collect", fails)
    report_after_training(run, attention=False)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no room" in said and "python -m detr_fabric.report" in said


def test_a_page_never_replaces_what_it_is_made_from(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", RECORDS)
    with pytest.raises(UserError, match="would overwrite"):
        report(run / "log.jsonl", Settings((str(run),), images=0))
    assert (run / "log.jsonl").read_text().count("\n") == len(RECORDS)
