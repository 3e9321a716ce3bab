"""The explorer's data: the checkpoints' own attention, the worst images and mistakes, the size of the page."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detr_fabric.analysis.capture import capture
from detr_fabric.data.batch import normalize, pad_images
from detr_fabric.errors import UserError
from detr_fabric.evaluate.match import Outcome
from detr_fabric.report.explore import explore, load
from detr_fabric.report.runs import find_runs
from detr_fabric.report.scan import Scanned, mistakes, spread, table, worst
from detr_fabric.report.settings import Settings
from detr_fabric.report.write import report
from tests.report.test_maps import decoded
from tests.report.test_page import embedded


@pytest.fixture(scope="module")
def explored(two_runs: list[Path]) -> dict[str, Any]:
    named = tuple(map(str, two_runs))
    return explore(find_runs(named), Settings(named, images=2, worst=2, threshold=0.0))


def test_blocks_hold_the_attention_that_the_checkpoints_compute(two_runs: list[Path], explored: dict[str, Any]) -> None:
    named = tuple(map(str, two_runs))
    subjects = load(list(enumerate(find_runs(named))), Settings(named), torch.device("cpu"))
    for each, run in zip(subjects, explored["explorer"]["runs"], strict=True):
        for picture, shown in zip(explored["explorer"]["images"], run["images"], strict=True):
            index = [str(image_id) for image_id in each.dataset.image_ids].index(picture["id"])
            with torch.no_grad(), capture(each.model) as seen:
                each.model(*normalize(pad_images([each.dataset[(0, index)][0]])))
            cross, encoder = seen.weights["decoder_cross"][1][0], seen.weights["encoder_self"][0][0]  # (H, T, S)
            cells = cross.shape[-1]
            assert np.prod(shown["grid"]) == cells and sorted(shown["queries"]) == list(range(7))
            queries, places = shown["queries"], shown["places"]
            for name, weights in (("cross/1/2", cross[2, queries]), ("encoder/0/mean", encoder.mean(0)[places])):
                read, numbers = decoded(shown["blocks"][name], len(weights), cells)
                assert np.array_equal(read == 0, weights.numpy() == 0)
                assert numbers[:, 1].tolist() == weights.count_nonzero(-1).tolist()
                assert numbers[:, 0] == pytest.approx(weights.amax(-1).numpy())
                assert np.abs(read - weights.numpy()).max() < 0.01
    counted = [run["images"][0]["blocks"]["cross/1/0"] for run in explored["explorer"]["runs"]]
    cells = int(np.prod(explored["explorer"]["runs"][0]["images"][0]["grid"]))
    softmax, sparsemax = (decoded(block, 7, cells)[1][:, 1].mean() for block in counted)
    assert softmax == cells and sparsemax < cells


def test_rows_of_the_runs_are_completed_from_their_checkpoints(explored: dict[str, Any]) -> None:
    assert explored["rows"][1]["mapping"] == "sparsemax" and explored["rows"][0]["backbone"] == "resnet18"
    assert explored["rows"][0]["parameters"] > 1e5


def test_three_runs_of_twelve_images_stay_within_the_size_that_is_asked_for(
    tmp_path: Path, two_runs: list[Path]
) -> None:
    named = tuple(map(str, two_runs))
    for megabytes in (0.05, 1.0):
        report(tmp_path / "page.html", Settings(named, images=4, worst=0, megabytes=megabytes))
        rest = 400_000  # scripts, photos, curves
        assert (tmp_path / "page.html").stat().st_size < megabytes * 2**20 + rest


def test_the_worst_images_have_the_lowest_mean_f1() -> None:
    counts, none = np.zeros((3, 3), int), np.array([], int)
    good, wrong, missed = Outcome(1, 0, none), Outcome(0, 1, np.array([0])), Outcome(0, 0, np.array([0]))
    made_up = Outcome(1, 1, none)
    one = Scanned(["cat", "dog"], {3: good, 5: wrong, 8: made_up}, counts)
    other = Scanned(["cat", "dog"], {3: good, 5: missed, 8: good, 9: missed}, counts)
    assert worst([one, other], 2) == [5, 8] and worst([one, other], 9) == [5, 8, 3]


def test_mistakes_are_counted_side_by_side() -> None:
    one, other = (
        Scanned(["cat", "dog"], {}, np.array(counts))
        for counts in ([[2, 1, 0], [0, 0, 0], [0, 1, 0]], [[2, 0, 2], [0, 0, 0], [0, 0, 0]])
    )
    assert {row["what"]: (row["values"], row["of"]) for row in mistakes([one, other])} == {
        "cat taken for dog": ([1, 0], [3, 0]),
        "dog where there is none": ([1, 0], [2, 0]),
        "cat missed": ([0, 2], [0, 4]),
    }


def test_the_table_of_classes_holds_those_that_occur() -> None:
    counts = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    run = Scanned(["cat", "dog", "emu"], {}, counts)
    assert table(run) == {"names": ["cat", "emu"], "counts": [[1, 1, 0], [0, 0, 1], [0, 1, 0]]}
    assert table(Scanned([str(n) for n in range(20)], {}, np.eye(21, dtype=int))) is None
    assert table(Scanned(["cat"], {}, np.zeros((2, 2), int))) is None


def test_images_are_spread_evenly() -> None:
    assert spread(10, 3) == [0, 3, 6] and spread(2, 5) == [0, 1] and spread(4, 0) == []


def test_data_that_are_gone_are_said_with_the_ways_out(two_runs: list[Path]) -> None:
    settings = Settings((str(two_runs[0]),), data_root="nowhere")
    with pytest.raises(UserError, match="nowhere.*--data-root.*--images 0"):
        explore(find_runs(settings.runs), settings)


def test_checkpoints_without_a_run_s_folder_show_settings_and_attention(tmp_path: Path, two_runs: list[Path]) -> None:
    alone = [tmp_path / f"{run.name}.ckpt" for run in two_runs]
    for file, run in zip(alone, two_runs, strict=True):
        shutil.copy(run / "best.ckpt", file)
    report(tmp_path / "page.html", Settings(tuple(map(str, alone)), images=1, worst=0, scan=0))
    content = embedded((tmp_path / "page.html").read_text())
    assert [row["name"] for row in content["settings"]["rows"]] == ["attn.kind", "attn.softmax_first"]
    rows = [(run["name"], run["row"]["mapping"], run["row"]["steps"]) for run in content["runs"]]
    assert rows == [("softmax", "softmax", 12), ("sparsemax", "sparsemax", 12)]
    assert len(content["explorer"]["images"]) == 1 and not content["mistakes"] and not content["charts"]
