"""What the attention of one or several checkpoints does, as numbers and pictures:

python -m detr_fabric.analysis runs/softmax/best.ckpt runs/sparsemax/best.ckpt --out attention --data.root coco
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Literal

from detr_fabric.cli import fail, parse, reader_may_leave
from detr_fabric.config import Config, DataConfig


@dataclass(frozen=True)
class Settings:
    """What is analysed and drawn; everything else comes from the checkpoints."""

    data: DataConfig = field(default_factory=DataConfig)
    out: str = "attention"
    """Folder for statistics.json, overview.png and the pictures."""
    images: int = 4
    """Images that are drawn: with objects, spread evenly over the validation images."""
    image_ids: tuple[str, ...] = ()
    """Ids of the images that are drawn, instead."""
    queries: int = 3
    """Queries drawn for each image: the most confident detections, or the surest true objects of a comparison."""
    query_ids: tuple[int, ...] = ()
    """Numbers of the queries that are drawn, instead of the most confident."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type."""

    def __post_init__(self) -> None:
        if self.images < 0 or self.queries < 1:
            raise ValueError(f"images is {self.images} and queries is {self.queries}: at least 0 and 1")
        if min(self.query_ids, default=0) < 0:
            raise ValueError(f"query-ids has {min(self.query_ids)}: queries count from 0")


@reader_may_leave()
def main() -> None:
    prog = "python -m detr_fabric.analysis"
    about = (
        "Analyses CHECKPOINTs, the first arguments: sparsity of every attention head over the validation images "
        "(statistics.json, overview.png), and pictures of the cross-attention, side by side for several checkpoints. "
        "Data settings default to those that the first checkpoint was trained with."
    )
    files = list(takewhile(lambda arg: not arg.startswith("-"), sys.argv[1:]))
    rest = sys.argv[1 + len(files) :]
    if not files:
        parse(Settings, Settings(), rest, prog, about)
        fail(ValueError(f"name a checkpoint: {prog} CHECKPOINT"))
    try:
        from detr_fabric.analysis.report import report
        from detr_fabric.checkpoint import load_checkpoint

        contents = {file: load_checkpoint(Path(file)) for file in files}
        first = Config.from_dict(contents[files[0]]["config"])
        report(contents, parse(Settings, Settings(first.data), rest, prog, about))
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main()
