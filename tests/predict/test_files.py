"""Files that prediction takes, those that it names and skips, and mistakes of its command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from detr_fabric import load
from detr_fabric.errors import UserError
from detr_fabric.predict.paths import find_images
from tests.predict.small import results, run, write_image


def test_files_are_named_by_their_path_in_the_folder_that_was_given(tmp_path: Path) -> None:
    for name in (
        "a/1.jpg",
        "a/b/02.PNG",
        "a/.hidden.jpg",
        "a/.git/3.jpg",
        "a/notes.txt",
        "out/pictures/1.jpg",
        "c/1.jpg",
        "text/notes.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def found(*paths: str) -> list[str]:
        return [name for _, name in find_images([str(tmp_path / path) for path in paths], tmp_path / "out")]

    assert found("a") == ["1.jpg", "b/02.PNG"]
    assert found("a/1.jpg", "a") == ["1.jpg", "b/02.PNG"]  # each once
    assert found("a/*", "a/**/0*") == ["1.jpg", "02.PNG"]
    assert found("") == ["a/1.jpg", "a/b/02.PNG", "c/1.jpg"]
    assert found("a", "c") == ["a/1.jpg", "a/b/02.PNG", "c/1.jpg"]  # two are called 1.jpg
    assert found("out/pictures/1.jpg", "a/notes.txt") == ["1.jpg", "notes.txt"]  # what is named counts
    for nothing in ("no.jpg", "x*.jpg", "text", "a/*.txt"):
        with pytest.raises(UserError, match="no image|no such file"):
            found(nothing)


def test_broken_files_are_named_and_skipped(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_image(tmp_path / "in" / "good.jpg")
    (tmp_path / "in" / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "in" / "cut.jpg").write_bytes(good.read_bytes()[:300])
    (tmp_path / "in" / "empty.png").touch()
    write_image(tmp_path / "in" / "other.webp")
    for size in (1, 3):
        assert (
            run(
                monkeypatch,
                checkpoint,
                tmp_path / "in",
                "--out",
                tmp_path / "out",
                "--batch-size",
                size,
                "--threshold",
                "0",
            )
            == 0
        )
        said = capsys.readouterr()
        assert {row["file_name"] for row in results(tmp_path / "out")} == {"good.jpg", "other.webp"}
        left_out = [line for line in said.err.splitlines() if line.startswith("left out: ")]
        assert [any(name in line for line in left_out) for name in ("page.jpg", "cut.jpg", "empty.png")] == [True] * 3
        assert "3 of 5 files were left out" in said.err and "in 2 images" in said.out
    assert run(monkeypatch, checkpoint, tmp_path / "in" / "page.jpg", "--out", tmp_path / "none") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: none of 1 files could be read")


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["{checkpoint}"], "name images, or folders of images"),
        (["nothing.ckpt", "{image}"], "nothing.ckpt: no such file"),
        (["{checkpoint}", "nothing.jpg"], "nothing.jpg: no such file or folder"),
        (["{checkpoint}", "{image}", "--out", "/dev/null/x"], "--out /dev/null/x: .*choose another folder"),
    ],
)
def test_mistakes_end_in_one_sentence(
    args: list[str],
    sentence: str,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    image = write_image(tmp_path / "image.png")
    assert run(monkeypatch, *(arg.format(checkpoint=checkpoint, image=image) for arg in args)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{sentence}", line), line


def test_a_threshold_that_is_no_score_is_refused(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, checkpoint, "any.jpg", "--threshold", "70") == 2
    assert "--threshold 70" in capsys.readouterr().err


def test_a_picture_never_replaces_a_file_it_is_made_from(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = write_image(tmp_path / "pictures" / "a.png")
    before = image.read_bytes()
    assert run(monkeypatch, checkpoint, image, "--out", tmp_path) == 2
    assert "would overwrite" in capsys.readouterr().err and image.read_bytes() == before


def test_a_photograph_is_turned_as_viewers_turn_it_and_that_is_said(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60)).save(tmp_path / "phone.jpg", exif=exif)
    assert run(monkeypatch, checkpoint, tmp_path / "phone.jpg", "--out", tmp_path / "out") == 0
    assert "1 of them were turned by their EXIF orientation tag" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "pictures" / "phone.jpg").size == (360, 540)
    detector = load(checkpoint, "cpu")
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "phone.jpg"))
    assert torch.equal(detector(tmp_path / "phone.jpg", 0).boxes, detector(turned, 0).boxes)
