"""What the command line of the check can say. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from detr_fabric.errors import UserError

PROG = "python -m detr_fabric.check"
ABOUT = """Lists everything that is wrong with a data set, says what training does about it, and prints the statistics
that matter to DETR. Training refuses a whole file, stops at an image that it cannot read (with --data.bad-images skip
it goes on without the image), drops boxes without area, clips boxes to their image, and keeps the rest.

With --fix it writes a copy that training accepts. The copy lacks annotations whose bbox is unusable or has no area,
annotations of an unknown or dropped image or category, images whose file_name leaves their folder and categories that
training refuses. Of several images or categories with one id it keeps the first, which gets the annotations of all.
Annotations with a repeated id get a new one. A wrong width, height, area or iscrowd is removed, because each may be
missing. With --images it also drops images at whose file training would stop. Ids of Pascal VOC and YOLO data become
numbers, and area is filled in, so that COCO tools accept the copy.

With --pictures it draws what there is: samples with their boxes, histograms of classes, sizes and objects per image,
and the first batches of training, augmented and padded.

Exit code: 0 if training accepts the data (with --fix: the copy), 1 if not, 2 if the command itself is wrong."""


@dataclass(frozen=True)
class CheckSettings:
    """Which data set to check, and how."""

    annotations: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[ANNOTATIONS.json]")] = None
    """COCO JSON, a folder of Pascal VOC XML files, or a folder of YOLO text files, which needs --images."""
    images: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the images, which are then all decoded. Unset: only the annotations are checked."""
    root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Check a whole data set instead: a folder in COCO's or Pascal VOC's layout, or YOLO's data.yaml."""
    builtin: bool = False
    """Check the built-in synthetic scenes instead, which training uses where no data is named."""
    annotations_only: bool = False
    """Do not read the images of --root."""
    pictures: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Draw the data into this folder: samples with their boxes, histograms, and batches as training sees them,
    augmented and padded. Needs --images, --root or --builtin."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None
    """Preset or a run's config.json, whose augmentation, batch size and seed --pictures shows. Unset: the defaults of
    training."""
    train_annotations: Annotated[str | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Training annotations whose categories ANNOTATIONS.json, for validation, must use."""
    label_space: Literal["contiguous", "coco91"] = "contiguous"
    """As --data.label-space in training."""
    split: Literal["train", "val"] | None = None
    """If ANNOTATIONS is a data.yaml: which of its images to check. Unset: those for training."""
    fix: Annotated[str | None, tyro.conf.arg(metavar="OUT.json")] = None
    """Write a copy that training accepts, as COCO JSON whatever the format of ANNOTATIONS.json."""
    augment: Annotated[str | None, tyro.conf.arg(metavar="FILE.py")] = None
    """Augmentation of your own that --pictures shows, as --data.augment in training. Unset: as --preset has."""
    queries: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Object queries of the model: an image can get no more detections than this. Unset: as --preset has, else 100."""
    show: int = 10
    """Ids or files to list for each finding; 0 lists all."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Processes that decode images. Unset: one per core."""

    def __post_init__(self) -> None:
        alone = (self.annotations, self.images, self.train_annotations, self.fix)
        whole = self.root is not None or self.builtin
        if whole and any(value is not None for value in alone) or (self.root is not None and self.builtin):
            raise UserError(
                f"{'--root' if self.root is not None else '--builtin'} goes without ANNOTATIONS.json, --images, "
                "--train-annotations and --fix: drop either"
            )
        if not whole and self.annotations_only:
            raise UserError("--annotations-only goes with --root: otherwise leave out --images")
        if self.pictures is not None and not whole and self.images is None:
            raise UserError("--pictures draws images: name their folder by --images FOLDER, or use --root")
        if (
            (self.queries is not None and self.queries < 1)
            or self.show < 0
            or (self.workers is not None and self.workers < 1)
        ):
            raise UserError("--queries and --workers must be 1 or more, --show 0 or more")
