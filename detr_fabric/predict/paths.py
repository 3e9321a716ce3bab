"""Image files named by paths, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detr_fabric.data.formats.files import IMAGE_SUFFIXES
from detr_fabric.errors import UserError


class ImageFile(NamedTuple):
    """A file and what it is called."""

    path: Path
    name: str  # relative, with slashes


def find_images(paths: Sequence[str], leave_out: Path) -> list[ImageFile]:
    """The files of paths, of folders with all that is in them, and of globs; each once, in this order.

    A file is called by its name or by its path inside the folder that was given; where that is not unique, by its path
    inside the deepest folder that holds them all. In folders and globs only files with an image's suffix count, and
    hidden ones and those in the folder `leave_out` don't. Raises UserError for a path that names nothing.
    """
    found: dict[Path, ImageFile] = {}
    for path in paths:
        for file in files_of(path, leave_out.resolve()):
            found.setdefault(file.path.resolve(), file)
    if len({file.name for file in found.values()}) < len(found):
        root = Path(os.path.commonpath([path.parent for path in found]))
        return [ImageFile(file.path, path.relative_to(root).as_posix()) for path, file in found.items()]
    return list(found.values())


def files_of(path: str, leave_out: Path | None = None) -> list[ImageFile]:
    """The file that a path names, or those of a folder or a glob, in their order; see find_images."""
    plain = Path(path)
    if plain.is_dir():
        files = [ImageFile(file, file.relative_to(plain).as_posix()) for file in _walk(plain, leave_out)]
    elif plain.exists():
        files = [ImageFile(plain, plain.name)]
    elif glob.has_magic(path):
        matches = [match for match in map(Path, sorted(glob.glob(path, recursive=True))) if _is_image(match)]
        files = [ImageFile(match, match.name) for match in matches if leave_out not in match.resolve().parents]
    else:
        raise UserError(f"{path}: no such file or folder")
    if not files:
        suffixes = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise UserError(f"{path}: holds no image; name files, or folders of {suffixes}")
    return files


def is_many(path: str) -> bool:
    """Whether a path is that of a folder, or a glob."""
    return Path(path).is_dir() or (glob.has_magic(path) and not Path(path).exists())


def _walk(folder: Path, leave_out: Path | None) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(root) / f).resolve() != leave_out)
        yield from (file for name in sorted(names) if _is_image(file := Path(root) / name))


def _is_image(file: Path) -> bool:
    """Whether a name is that of an image; a pipe or a device of such a name is named when it is opened."""
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and not file.is_dir()
