"""The settings of an analysis, as flags. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from detr_fabric.config import DataConfig
from detr_fabric.errors import UserError

PROG = "python -m detr_fabric.analysis"
ABOUT = """Analyses the attention of checkpoints: sparsity of every attention head over the validation images
(statistics.json, overview.png), and pictures of the cross-attention, side by side for several checkpoints. Data
settings default to those that the first checkpoint was trained with."""


@dataclass(frozen=True)
class AnalysisSettings:
    """What is analysed and drawn; everything else comes from the checkpoints."""

    checkpoints: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="CHECKPOINT ...", help_behavior_hint="(required)"),
    ]
    """.ckpt files from the folders of runs, the original DETR's files, or folders of transformers."""
    data: DataConfig = field(default_factory=DataConfig)
    out: str = "attention"
    """Folder for statistics.json, overview.png, tables (measures.*, paibb.* as CSV, Markdown and LaTeX), records
    (images.csv, pairs.csv) and the pictures."""
    images: int = 4
    """Images that are drawn: with objects, spread evenly over the validation images."""
    image_ids: tuple[str, ...] = ()
    """Ids of the images that are drawn, instead."""
    queries: int = 3
    """Queries drawn for each image: the detections with the highest scores; in a comparison, the objects found
    with the highest scores."""
    query_ids: tuple[int, ...] = ()
    """Numbers of the queries that are drawn, instead of the most confident."""
    random: bool = False
    """Analyse each model also as it was before its first step: the baseline of every measure."""
    dc5: bool = False
    """The original checkpoints are of DC5 models, which their weights don't show."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type."""

    def __post_init__(self) -> None:
        if self.images < 0 or self.queries < 1:
            raise UserError(f"images is {self.images} and queries is {self.queries}: at least 0 and 1")
        if min(self.query_ids, default=0) < 0:
            raise UserError(f"query-ids has {min(self.query_ids)}: queries count from 0")
