"""Two runs with small random models, softmax and sparsemax, on a few scenes: folders, checkpoints and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detr_fabric.config import AttnConfig, Config, DataConfig, Mapping
from tests.analysis.small import write_checkpoint
from tests.report.folders import FIGURES, RECORDS, write_run


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    data = DataConfig(shapes_train=2, shapes_val=6, shapes_dir=str(folder / "shapes"), workers=0)
    kinds: tuple[Mapping, ...] = ("softmax", "sparsemax")
    for kind in kinds:
        attn = AttnConfig(kind=kind)
        write_checkpoint(folder / kind / "best.ckpt", Config(data=data).resolve(), {}, attn)
        write_run(folder, kind, RECORDS, attn)
    evaluated = FIGURES | {"AP": 0.125, "seconds": 36.0}
    (folder / "softmax" / "evaluation.json").write_text(json.dumps(evaluated))  # the other one is of an earlier version
    (folder / "sparsemax" / "evaluation.json").write_text(json.dumps({"step": 30, "AP": 0.125}))
    return [folder / kind for kind in kinds]
