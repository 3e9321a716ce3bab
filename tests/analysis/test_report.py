"""The command: what it writes, and its sentences for mistakes."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
from PIL import Image

from detr_fabric.analysis import __main__ as entry
from detr_fabric.analysis.report import subject_names, with_areas
from detr_fabric.analysis.statistics import PairRecord
from detr_fabric.config import AttnConfig, Config, TrainConfig
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.transforms import EvalTransform
from tests.analysis.small import write_checkpoint
from tests.coco_files import coco, image, thing


@pytest.fixture(scope="module")
def checkpoints(shapes: Config, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models of different depth and number of heads."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        str(write_checkpoint(folder / "a" / "last.ckpt", shapes, {}, AttnConfig(kind="softmax"))),
        str(
            write_checkpoint(
                folder / "b" / "last.ckpt",
                replace(shapes, train=TrainConfig(seed=0)),
                {"dec_layers": 1, "heads": 2, "num_queries": 2},
                AttnConfig(kind="sparsemax", encoder_self="softmax"),
            )
        ),
    ]


def analyse(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["detr_fabric.analysis", *args])
    entry.main()


@pytest.mark.process
def test_the_command_writes_numbers_and_pictures(
    checkpoints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    analyse(monkeypatch, *checkpoints, "--out", str(out), "--images", "2", "--data.val-limit", "6", "--queries", "2")
    said = capsys.readouterr().out
    assert "run (a): 6 images, step 12" in said and "run (b): 6 images, step 12" in said
    first, second = json.loads((out / "statistics.json").read_text())["models"]
    assert (first["name"], first["step"], first["images"]) == ("run (a)", 12, 6)
    assert second["mapping"] == dict(encoder_self="softmax", decoder_self="sparsemax", decoder_cross="sparsemax")
    assert len(first["heads"]) == (1 + 2 + 2) * 4 and len(second["heads"]) == (1 + 1 + 1) * 2
    assert first["curves"]["attention/decoder_cross/layer0/zeros"] == 0
    assert second["curves"]["attention/decoder_cross/layer0/zeros"] > 0.1
    pictures = sorted(path.name for path in out.glob("*.png"))
    ids = sorted({name.removesuffix(".png").split("_")[0] for name in pictures} - {"overview"})
    assert len(ids) == 2
    assert pictures == sorted(["overview.png"] + [f"{i}{part}.png" for i in ids for part in ("", "_run_a", "_run_b")])
    widths = {part: Image.open(out / f"{ids[0]}_{part}.png").width for part in ("run_a", "run_b")}
    assert widths["run_a"] > 5 * 168 and widths["run_b"] > 3 * 168  # the mean and every head side by side


@pytest.mark.process
def test_records_and_tables_are_written_also_of_random_weights(
    checkpoints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analyse(
        monkeypatch,
        checkpoints[1],
        "--random",
        "--images",
        "0",
        "--data.val-limit",
        "5",
        "--out",
        str(tmp_path / "out"),
    )
    images, pairs, layers, paibb = (
        list(csv.DictReader((tmp_path / "out" / f"{name}.csv").open()))
        for name in ("images", "pairs", "measures", "paibb")
    )
    models = ["run", "run, random weights"]
    assert [row["model"] for row in layers] == [name for name in models for _ in range(3)]
    assert len(images) == 2 * 5 * 3 and {row["layer"] for row in layers} == {"1"}
    for row in layers:
        mine = [r for r in images if (r["model"], r["site"]) == (row["model"], row["site"])]
        zeros = [float(r["zeros"]) for r in mine]
        assert len(mine) == 5 and float(row["zeros mean"]) == pytest.approx(mean(zeros))
        assert float(row["zeros std"]) == pytest.approx(stdev(zeros))
    assert [row["objects"] for row in paibb] == 2 * ["all", "small", "medium", "large"]
    for row in paibb:
        mine = [r for r in pairs if r["model"] == row["model"] and row["objects"] in ("all", r["size"])]
        assert len(mine) == int(row["pairs"])
        if mine:
            assert float(row["PAIBB mean"]) == pytest.approx(mean(float(r["paibb"]) for r in mine))
            by_image = {
                r["image_id"]: [float(o["paibb"]) for o in mine if o["image_id"] == r["image_id"]] for r in mine
            }
            if len(by_image) > 1:
                assert float(row["PAIBB std"]) == pytest.approx(stdev(map(mean, by_image.values())))
    assert len(pairs) == 2 * int(paibb[4]["pairs"]) > 0
    # The checkpoint was saved before its first step, so it has the weights that training starts from.
    assert [{**row, "model": ""} for row in layers[:3]] == [{**row, "model": ""} for row in layers[3:]]
    assert (tmp_path / "out" / "paibb.tex").read_text().startswith(r"\begin{tabular}{lllcc}")


def test_areas_are_those_of_the_annotations_without_crowds(tmp_path: Path) -> None:
    made = [thing(1, 5, [0, 0, 9, 9], area=3), thing(2, 5, [0, 0, 8, 8], iscrowd=1), thing(3, 5, [1, 1, 4, 4], area=7)]
    (tmp_path / "a.json").write_text(json.dumps(coco([image(5)], made)))
    data = CocoDetection(tmp_path, read_annotations(tmp_path / "a.json"), EvalTransform(16, 16), 0)
    pairs = [PairRecord(5, 0, number, 81.0, 0.5, 0.5) for number in (1, 0)]
    assert [pair.area for pair in with_areas(pairs, data)] == [7, 3]


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["--image-ids", "none"], "--image-ids none: the data has no such image"),
        (["--query-ids", "0", "5"], r"--query-ids 5: .*last.ckpt has queries 0 to 1"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: .*choose another folder"),
    ],
)
def test_mistakes_end_in_one_sentence(
    args: list[str],
    sentence: str,
    checkpoints: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        analyse(monkeypatch, *checkpoints, "--images", "1", *args)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(sentence, line), line


def test_a_checkpoint_that_is_missing_or_not_named_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, sentence in (((), "name a checkpoint"), (("no.ckpt",), "no.ckpt: no such file")):
        with pytest.raises(SystemExit) as ended:
            analyse(monkeypatch, *args)
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.process
def test_help_comes_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['analysis', '--help']\n"
        "from detr_fabric.analysis.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print('code', end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "--queries" in done.stdout and done.stdout.endswith("code 0 False\n"), done.stderr


def test_models_are_told_apart_by_name_then_folder_then_path() -> None:
    assert subject_names({"x/a/last.ckpt": "r18", "x/b/last.ckpt": "r50"}) == {
        "x/a/last.ckpt": "r18",
        "x/b/last.ckpt": "r50",
    }
    same = subject_names({"x/a/last.ckpt": "r18", "x/b/last.ckpt": "r18"})
    assert list(same.values()) == ["r18 (a)", "r18 (b)"]
    both = {"x/a/last.ckpt": "r18", "x/a/best.ckpt": "r18"}
    assert subject_names(both) == {file: file for file in both}
