"""Pictures of detections and of their attention."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from detr_fabric import load
from detr_fabric.analysis.capture import capture, unwrap
from detr_fabric.data.batch import normalize, pad_images
from detr_fabric.predict import files
from tests.patching import Patch
from tests.predict.small import results, run, write_image


@pytest.mark.process
def test_pictures_and_attention_are_drawn_for_each_image_and_detection(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch: Patch
) -> None:
    write_image(tmp_path / "in" / "small.png", 90, 60)
    write_image(tmp_path / "in" / "deep" / "large.jpg", 900, 1600)
    looks = []
    draw_figure = files.detection_figure
    patch(files, "detection_figure", lambda maps, *rest: looks.append((maps, *rest)) or draw_figure(maps, *rest))
    args = (checkpoint, tmp_path / "in", "--out", tmp_path / "out", "--accelerator", "cpu")
    assert run(monkeypatch, *args, "--threshold", "0", "--attention", "--batch-size", "2") == 0
    folder = tmp_path / "out"
    assert Image.open(folder / "pictures" / "deep" / "large.jpg").size == (900, 1600)
    assert Image.open(folder / "pictures" / "small.png").size == (540, 360)  # enlarged, so that text can be read
    detector = load(checkpoint, "cpu")
    assert len(looks) == 2
    for look, queries, name in looks:
        found = detector(tmp_path / "in" / name, threshold=0)
        assert sorted(queries) == list(range(7)) == sorted(found.queries.tolist())
        with capture(detector.model) as seen, torch.no_grad():
            image = detector.prepare(found.image).image
            unwrap(detector.model)(*normalize(pad_images([image])))
        for layer, weights in enumerate(look.cross):  # (H, Q, h, w)
            expected = seen.weights["decoder_cross"][layer][0].unflatten(-1, seen.mask.shape[-2:])
            torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
        sheet = Image.open(folder / "attention" / f"{name}.png")
        assert sheet.height > 7 * sheet.width / 12  # seven rows of six tiles and their names
    shutil.rmtree(folder)
    assert run(monkeypatch, *args, "--threshold", "1", "--attention") == 0
    assert results(folder) == [] and not (folder / "attention").exists()


def test_a_query_that_found_two_classes_has_one_row_of_attention(checkpoint: str, tmp_path: Path) -> None:
    detector = load(checkpoint, "cpu")
    found = detector(write_image(tmp_path / "a.png"), threshold=0)
    once, twice = (files.attention_figure(detector, found[rows], "best") for rows in ([0, 1], [0, 1, 0]))
    assert once.size == twice.size


def test_files_whose_names_are_no_text_are_predicted_and_drawn(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsdecode(b"caf\xe9 \xff.png")
    write_image(tmp_path / "a.png").rename(tmp_path / name)
    args = (checkpoint, tmp_path / name, "--out", tmp_path / "out", "--threshold", "0", "--attention")
    assert run(monkeypatch, *args) == 0
    assert {row["file_name"] for row in results(tmp_path / "out")} == {name}
    assert (tmp_path / "out" / "attention" / f"{name}.png").exists()


def test_several_processes_are_refused(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for key, value in (ranks | {"TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(key, value)
    assert run(monkeypatch, checkpoint, write_image(tmp_path / "a.png"), "--out", tmp_path / "out") == 2
    assert "one process, not in 2" in capsys.readouterr().err
