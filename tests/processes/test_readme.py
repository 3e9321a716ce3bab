"""The README's four commands for somebody's own data, run as they stand, on drawn pictures in Pascal VOC's form."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

from tests.coco_files import coco, image, thing, write_images
from tests.commands import REPOSITORY, python
from tests.format_files import write_voc

# The original weights can't be downloaded everywhere, and a ResNet-50 is slow.
TINY = ("--preset debug", "--train.accelerator cpu", "--model.backbone-weights none", "--data.scales 64")


def own_data_commands() -> list[list[str]]:
    text = (REPOSITORY / "README.md").read_text()
    block = text.partition("## Your own data")[2].partition("```sh\n")[2].partition("```")[0]
    lines = block.replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line.replace("--preset finetune_r50", " ".join(TINY))) for line in lines]


def test_the_four_commands_for_own_data_run_as_written(tmp_path: Path) -> None:
    count = 16
    content = coco(
        [image(number) for number in range(1, count + 1)],
        [thing(number, number, category=1 + number % 2) for number in range(1, count + 1)],
    )
    write_images(tmp_path / "mine" / "JPEGImages", content)
    write_voc(tmp_path / "mine" / "Annotations", content)
    shutil.copytree(tmp_path / "mine" / "JPEGImages", tmp_path / "photos")
    commands = own_data_commands()
    assert [command[:3] for command in commands] == [
        ["python", "-m", f"detr_fabric.{tool}"] for tool in ("check", "train", "predict", "evaluate")
    ]
    for command in commands:
        done = python(*command[1:], cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stdout + done.stderr
    written = {path.name for path in (tmp_path / "runs" / "mine").iterdir()}
    assert {"best.ckpt", "last.ckpt", "config.json", "log.jsonl", "evaluation.json", "worst.png"} <= written
    assert re.search(r"AP50 +\S+", done.stdout)
    predictions = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert isinstance(predictions, list)
