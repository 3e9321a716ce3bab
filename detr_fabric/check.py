"""Checks a COCO-format data set before it costs GPU time: what is wrong, what training does with it, what DETR sees.

python -m detr_fabric.check annotations.json --images folder
"""

from __future__ import annotations

import gc
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from detr_fabric.cli import fail, parse, reader_may_leave
from detr_fabric.data.annotations import inspect_content, read_annotations
from detr_fabric.data.categories import Categories, LabelSpace
from detr_fabric.data.columns import short
from detr_fabric.data.decoding import FileFault, Size, read_sizes
from detr_fabric.data.layouts import is_folder_of_annotations, read_content, root_paths
from detr_fabric.data.repair import Finding, repair
from detr_fabric.data.report import objects_per_image, print_findings, print_statistics, printable
from detr_fabric.errors import UserError
from detr_fabric.progress import counted

PROG = "python -m detr_fabric.check"
ABOUT = """Finds everything that is wrong with a COCO-format data set, says what training does about it, and shows what
matters to DETR. Training refuses a file as a whole, stops at an image that it cannot read (with --data.bad-images skip
it goes on without it), drops boxes without area, clips boxes to their image, and keeps the rest.

A copy that training accepts is written by --fix. It drops annotations whose bbox is unusable or has no area or whose
image or category is unknown or dropped, images whose file_name leaves their folder, categories that training refuses,
and of images or categories with one id all but the first, which gets the annotations of all; with --images also images
at whose file training would stop. Annotations with the id of another get a new one. A wrong width, height, area or
iscrowd is removed, as each may be missing.

Exit code: 0 if training accepts the data (with --fix: the copy), 1 if not, 2 if the command itself is wrong."""


@dataclass(frozen=True)
class Settings:
    """What is checked."""

    annotations: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="ANNOTATIONS.json")] = None
    """COCO JSON; or a folder of Pascal VOC XML files; or, with --images, a folder of YOLO's text files."""
    images: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of its images, which are then all decoded. Unset: only the annotations are checked."""
    root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Instead of ANNOTATIONS.json: folder in COCO's layout (train2017/, val2017/, annotations/), in Pascal VOC's, or
    YOLO's data.yaml, checked as a whole."""
    annotations_only: bool = False
    """With --root: leave the images unread."""
    train_annotations: Annotated[str | None, tyro.conf.arg(metavar="FILE.json")] = None
    """ANNOTATIONS.json is for validation in a training on this file, and must use its categories."""
    label_space: LabelSpace = "contiguous"
    """As in training's --data.label-space."""
    fix: Annotated[str | None, tyro.conf.arg(metavar="OUT.json")] = None
    """Write a copy of ANNOTATIONS.json that training accepts; also of Pascal VOC's and YOLO's, as COCO JSON."""
    queries: int = 100
    """Object queries of the model: the most objects that an image can get."""
    show: int = 10
    """Ids or files named of each fault; 0: all."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Processes that decode images. Unset: one per core."""

    def __post_init__(self) -> None:
        alone = (self.annotations, self.images, self.train_annotations, self.fix)
        if self.root is not None and any(value is not None for value in alone):
            raise UserError(
                "--root goes without ANNOTATIONS.json, --images, --train-annotations and --fix: drop either"
            )
        if self.root is None and self.annotations_only:
            raise UserError("--annotations-only goes with --root: else leave out --images")
        if self.queries < 1 or self.show < 0 or (self.workers is not None and self.workers < 1):
            raise UserError("--queries and --workers must be 1 or more, --show 0 or more")


class Part(NamedTuple):
    """An annotation file and, if they are to be decoded, the folder of its images."""

    annotations: Path
    images: Path | None


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # class names of any script on terminals of any encoding
    try:
        accepted = run(parse(Settings, Settings(), sys.argv[1:] if argv is None else argv, PROG, ABOUT))
    except UserError as error:
        fail(error)
    except MemoryError:
        fail(UserError("the data set does not fit into memory: try fewer --workers, or a larger machine"))
    except RecursionError:
        fail(UserError("the JSON is nested so deeply that it cannot be worked on: export it again"))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if accepted else 1)


def run(settings: Settings) -> bool:
    """Prints everything. Returns whether training would accept the data, or the copy if one is asked for.

    Raises UserError for what is wrong with the command.
    """
    categories, accepted = None, True
    gc.disable()  # as inspect_annotations does, and for its reason
    try:
        for part in _parts(settings):
            if settings.train_annotations is not None:
                categories = read_annotations(Path(settings.train_annotations), None, settings.label_space).categories
            accepted_part, own_categories = _check(part, categories, settings)
            categories, accepted = categories or own_categories, accepted and accepted_part
    finally:
        gc.enable()
    return accepted


def _parts(settings: Settings) -> list[Part]:
    """What is to be checked, training data first; all of it is there."""
    if settings.root is not None:
        root = Path(settings.root)
        parts = [
            Part(annotations, images) for images, annotations in (root_paths(root, "train"), root_paths(root, "val"))
        ]
    elif settings.annotations is not None:
        parts = [Part(Path(settings.annotations), None if settings.images is None else Path(settings.images))]
    else:
        raise UserError(f"name what to check: {PROG} ANNOTATIONS.json, or --root FOLDER; --help tells more")
    for part in parts:
        file = part.annotations
        if not (os.access(file, os.R_OK) and (file.is_file() or is_folder_of_annotations(file))):
            raise UserError(
                f"{file} is no file that can be read, and no folder of .xml or .txt files: check the path of the "
                "annotations"
            )
        if not (part.images is None or part.images.is_dir() or settings.annotations_only):
            raise UserError(f"{part.images} is no folder: check the path of the images")
    if settings.fix is not None:
        out, inputs = Path(settings.fix), (settings.annotations, settings.train_annotations)
        if out.is_dir() or not out.parent.is_dir():
            raise UserError(f"--fix {out} is a folder, or in none: name a file in a folder that exists")
        if out.exists() and any(out.samefile(file) for file in inputs if file is not None):
            raise UserError(f"--fix {out} would overwrite its input: name another file")
    return parts


def _check(part: Part, training: Categories | None, settings: Settings) -> tuple[bool, Categories | None]:
    """Prints what is wrong with one annotation file, and what is in it.

    training: categories that it must use. Returns whether training would accept it, or its copy, and its categories.
    """
    path = part.annotations
    print(printable(str(path)), flush=True)
    try:
        content = read_content(path, part.images, training, polygons=settings.fix is not None)
    except UserError as error:
        print(f"training refuses it: {printable(str(error))}\n")
        return False, None
    read = None
    if part.images is not None and not settings.annotations_only:
        read = partial(_read_sizes, part.images, settings.workers or len(os.sched_getaffinity(0)))
    repaired = repair(content, training, settings.label_space, read)
    findings, annotations = repaired.findings, None
    if repaired.content is not None:
        annotations, problems = inspect_content(repaired.content, training, settings.label_space)
        assert annotations is not None, f"repair.py and annotations.py disagree: {problems}"
        crowded = annotations.image_ids[objects_per_image(annotations) > settings.queries].tolist()
        if crowded:
            what = f"images with more objects than {settings.queries} queries"
            findings.append(Finding(what, "keeps", "keeps", list(map(short, crowded))))

    for table, (rows, kept) in repaired.rows.items():
        print(f"{rows:>9,}  {table}" + (f", {rows - kept:,} of them not usable" if kept < rows else ""))
    print_findings(findings, settings.show)
    if annotations is not None:
        print_statistics(annotations, settings.queries)
    accepted = not any(finding.training in ("refuses", "stops") for finding in findings)
    unseen = "" if read else " (the image files were not looked at)"
    print(f"  training {'accepts' if accepted else 'does not accept'} it{unseen}")
    if not accepted and settings.fix is None and repaired.content is not None:
        print(f"  to write a copy that it accepts: {printable(_fixing(part, training is not None, settings))}")
    if settings.fix is not None and repaired.content is None:
        print(f"  {printable(settings.fix)} was not written: nothing would be left")
    elif settings.fix is not None and repaired.content is not None:
        _write_copy(Path(settings.fix), repaired.content, training, settings.label_space)
        print(f"  training accepts the copy {printable(settings.fix)}")
        accepted = True
    print()
    return accepted, None if annotations is None else annotations.categories


def _fixing(part: Part, for_validation: bool, settings: Settings) -> str:
    """The command that mends one annotation file."""
    command = [*PROG.split(), str(part.annotations), "--fix", "OUT.json"]
    if part.images is not None and not settings.annotations_only:
        command += ["--images", str(part.images)]
    if for_validation:
        training = settings.train_annotations or root_paths(Path(str(settings.root)), "train")[1]
        command += ["--train-annotations", str(training)]
    if settings.label_space != "contiguous":
        command += ["--label-space", settings.label_space]
    return shlex.join(command)


def _write_copy(out: Path, content: dict[str, Any], training: Categories | None, label_space: LabelSpace) -> None:
    """Writes the copy and reads it as training does, under another name until both are done."""
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with unfinished.open("w") as file:
            file.write(json.dumps(content))
            file.flush()
            os.fsync(file.fileno())
        read_annotations(unfinished, training, label_space)
        unfinished.replace(out)
    except OSError as error:
        raise UserError(f"--fix {out} cannot be written ({error.strerror}): name another file") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _read_sizes(folder: Path, workers: int, images: list[dict[str, Any]]) -> list[Size | FileFault]:
    with counted(len(images)) as progress:
        return read_sizes(folder, images, workers, progress)


if __name__ == "__main__":
    main()
