"""Checks each split of a data set, prints the result and writes the repaired copy."""

from __future__ import annotations

import gc
import os
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from detr_fabric.check.copy import renumber, write_copy
from detr_fabric.check.decoding import FileProblem, FileSize, read_sizes
from detr_fabric.check.repair import Finding, repair
from detr_fabric.check.settings import PROG, CheckSettings
from detr_fabric.check.statistics import print_findings, print_statistics
from detr_fabric.config import Config, DataConfig
from detr_fabric.data import synthetic
from detr_fabric.data.doubts import doubts
from detr_fabric.data.formats.annotations import inspect_content, read_annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.formats.data_yaml import YAML, NoValidation, Split
from detr_fabric.data.formats.detect import is_folder_of_annotations, read_content, root_paths
from detr_fabric.data.formats.fields import short
from detr_fabric.data.summary import objects_per_image
from detr_fabric.errors import UserError
from detr_fabric.presets import starting_config
from detr_fabric.runtime.files import check_outputs, writing
from detr_fabric.terminal import counted, say


class Source(NamedTuple):
    """The annotations of the training or the validation images, and the folder of these if it was named."""

    annotations: Path
    images: Path | None
    split: Split


def check(settings: CheckSettings) -> bool:
    """Prints everything. Returns whether training would accept the data, or the copy if one was asked for.

    Raises UserError for a wrong command.
    """
    config = _training(settings)
    if settings.builtin:
        data = config.data
        root = synthetic.prepare(data.shapes_size, data.shapes_train, data.shapes_val, data.shapes_dir)
        settings = replace(settings, builtin=False, root=str(root))
    categories, accepted = None, True
    gc.disable()  # for speed, as in inspect_annotations
    try:
        for source in _sources(settings):
            if settings.train_annotations is not None:
                categories = read_annotations(Path(settings.train_annotations), None, settings.label_space).categories
            source_accepted, own_categories = _check_source(source, categories, settings, config)
            categories, accepted = categories or own_categories, accepted and source_accepted
    finally:
        gc.enable()
    return accepted


def _training(settings: CheckSettings) -> Config:
    """The settings of training on the data that is checked."""
    config = starting_config(settings.preset, Config() if settings.builtin else Config(data=DataConfig(root=".")))
    data = replace(
        config.data,
        root=None if settings.builtin else ".",
        train_images=None,
        train_annotations=None,
        val_images=None,
        val_annotations=None,
        val_fraction=None,
        augment=settings.augment or config.data.augment,
    )
    return replace(config, data=data).resolve()


def _sources(settings: CheckSettings) -> list[Source]:
    """What to check, training data first. Raises UserError where a file or folder is missing."""
    sources: list[Source] = []
    if settings.root is not None:
        try:
            for split in get_args(Split):
                images, annotations = root_paths(Path(settings.root), split)
                sources.append(Source(annotations, images, split))
        except NoValidation as error:
            say(f"no validation images: {error}")
            say()
    elif settings.annotations is not None:
        folder = None if settings.images is None else Path(settings.images)
        sources.append(Source(Path(settings.annotations), folder, settings.split or "train"))
    else:
        raise UserError(f"name what to check: {PROG} ANNOTATIONS.json, or --root FOLDER; see --help")
    for file, folder, _ in sources:
        if not (os.access(file, os.R_OK) and (file.is_file() or is_folder_of_annotations(file))):
            raise UserError(
                f"{file} is no file that can be read, and no folder of .xml or .txt files: check the path of the "
                "annotations"
            )
        if not (folder is None or folder.is_dir() or settings.annotations_only):
            raise UserError(f"{folder} is no folder: check the path of the images")
    if settings.pictures is not None:
        _make_folder(Path(settings.pictures), sources)
    if settings.fix is not None:
        out = Path(settings.fix)
        if out.is_dir() or not out.parent.is_dir():
            raise UserError(
                f"--fix {out} is a folder, or its folder does not exist: name a file in a folder that exists"
            )
        check_outputs(f"--fix {out}", [out], [*(source.annotations for source in sources), settings.train_annotations])
    return sources


def _make_folder(out: Path, sources: list[Source]) -> None:
    """The folder for pictures, which must not become part of the data."""
    if any(images is not None and images.resolve() == out.resolve() for _, images, _ in sources):
        raise UserError(f"--pictures {out} holds the data's own images: name another folder")
    with writing(f"--pictures {out}", "choose another folder"):
        out.mkdir(parents=True, exist_ok=True)


def _check_source(
    source: Source, training: Categories | None, settings: CheckSettings, config: Config
) -> tuple[bool, Categories | None]:
    """Prints what is wrong with one annotation file, and what is in it.

    training: the categories it must use; config: of training. Returns whether training would accept it (or its copy),
    and its categories.
    """
    path, folder, split = source
    queries = settings.queries or config.model.num_queries
    say(str(path))
    try:
        content = read_content(path, folder, training, split, polygons=settings.fix is not None)
    except UserError as error:
        say(f"training refuses it: {error}")
        say()
        return False, None
    read = None
    if folder is not None and not settings.annotations_only:
        read = partial(_read_sizes, folder, settings.workers or len(os.sched_getaffinity(0)))
    repaired = repair(content.tables, training, settings.label_space, read)
    findings, annotations = repaired.findings, None
    if repaired.tables is not None:
        left = content._replace(tables=repaired.tables)
        annotations, problems = inspect_content(left, training, settings.label_space)
        assert annotations is not None, f"repair.py and annotations.py disagree: {problems}"
        if training is None and annotations.crowd.all():
            findings.insert(0, Finding("objects to train on are missing", "refuses", "is impossible", []))
        crowded = annotations.image_ids[objects_per_image(annotations) > queries].tolist()
        if crowded:
            what = f"images with more objects than {queries} queries"
            findings.append(Finding(what, "keeps", "keeps", list(map(short, crowded))))
        findings += [Finding(doubt, "keeps", "", []) for doubt in doubts(annotations)]

    for table, (rows, kept) in repaired.rows.items():
        say(f"{rows:>9,}  {table}" + (f", {rows - kept:,} of them not usable" if kept < rows else ""))
    for note in content.notes if annotations is None else annotations.notes:
        say(f"  {note}")
    print_findings(findings, settings.show)
    if annotations is not None:
        print_statistics(annotations, queries)
        if settings.pictures is not None and folder is not None:
            from detr_fabric.check.pictures import write_pictures  # which needs torch

            drawn = write_pictures(Path(settings.pictures), split, folder, annotations, config, queries)
            say(f"  drawn into {settings.pictures}: {', '.join(drawn)}")
    accepted = not any(finding.training in ("refuses", "stops") for finding in findings)
    unseen = "" if read else " (the image files were not looked at)"
    say(f"  training {'accepts' if accepted else 'does not accept'} it{unseen}")
    copyable = annotations is not None and not annotations.crowd.all()
    if not accepted and settings.fix is None and copyable:
        say(f"  to write a copy that it accepts: {_fix_command(source, training is not None, settings)}")
    if settings.fix is not None and copyable and repaired.tables is not None:
        tables = renumber(repaired.tables, training) if content.converted else repaired.tables
        write_copy(Path(settings.fix), tables, training, settings.label_space)
        say(f"  training accepts the copy {settings.fix}")
        accepted = True
    elif settings.fix is not None:
        say(f"  {settings.fix} was not written: no object would be left")
        accepted = False
    say()
    return accepted, None if annotations is None else annotations.categories


def _fix_command(source: Source, for_validation: bool, settings: CheckSettings) -> str:
    """The command that repairs one annotation file."""
    command = [*PROG.split(), str(source.annotations), "--fix", "OUT.json"]
    if source.images is not None and not settings.annotations_only:
        command += ["--images", str(source.images)]
    if source.annotations.suffix in YAML and source.split == "val":
        command += ["--split", "val"]
    if for_validation:
        training = settings.train_annotations or root_paths(Path(str(settings.root)), "train")[1]
        command += ["--train-annotations", str(training)]
    if settings.label_space != "contiguous":
        command += ["--label-space", settings.label_space]
    return shlex.join(command)


def _read_sizes(folder: Path, workers: int, images: list[dict[str, Any]]) -> list[FileSize | FileProblem]:
    with counted("images", len(images)) as progress:
        return read_sizes(folder, images, workers, progress)
