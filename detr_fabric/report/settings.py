"""What a command line says of a report. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from detr_fabric.errors import UserError

PROG = "python -m detr_fabric.report"

ABOUT = """Writes one HTML file that shows runs side by side: what they reached, the settings in which they differ,
curves, classes, the worst images, and an explorer of their attention. RUN is the folder of a run, a checkpoint, or a
folder of runs, such as a study's. The file needs no network; it can be sent to others as it is."""


@dataclass(frozen=True)
class Settings:
    """What the page shows."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...", help_behavior_hint="(required)")
    ]
    """Folders of runs, checkpoints, or folders of runs."""
    out: str = "report.html"
    """The file."""
    images: int = 8
    """Images of the attention explorer: with objects, spread evenly over the validation images. 0: no attention and no
    worst images; then neither data nor checkpoints are needed."""
    worst: int = 4
    """Further images: those that went worst, by mean F1 over the runs."""
    scan: int = 200
    """Validation images, spread evenly, in which the worst ones and the confusion of classes are looked for."""
    threshold: float = 0.5
    """Smallest score of a detection that counts in F1 and confusion and is drawn."""
    image_ids: tuple[str, ...] = ()
    """Ids of the images of the explorer, instead of `images`."""
    queries: int = 20
    """Most object queries kept for each image: those with the highest scores."""
    megabytes: float = 9.5
    """Largest size of photos and attention in the page. Beyond it, heads and early layers are left out."""
    data_root: str | None = None
    """Data to look at. Unset: the validation data of the first run."""
    dc5: bool = False
    """An original checkpoint is of a DC5 model, which its weights don't show."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type."""

    def __post_init__(self) -> None:
        if min(self.images, self.worst, self.scan) < 0:
            raise UserError(f"--images {self.images} --worst {self.worst} --scan {self.scan}: 0 or more each")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: a score lies in [0, 1]")
        if self.queries < 1 or self.megabytes <= 0:
            raise UserError(f"--queries {self.queries} --megabytes {self.megabytes}: 1 or more, and above 0")
