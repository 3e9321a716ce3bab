"""Image files named by paths, folders and globs, and the ids that their detections go by."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detr_fabric.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


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
        files = list(_files(path, leave_out.resolve()))
        if not files:
            raise UserError(f"{path}: holds no image; name files, or folders of {', '.join(s[1:] for s in SUFFIXES)}")
        for file in files:
            found.setdefault(file.path.resolve(), file)
    if len({file.name for file in found.values()}) < len(found):
        root = Path(os.path.commonpath([path.parent for path in found]))
        return [ImageFile(file.path, path.relative_to(root).as_posix()) for path, file in found.items()]
    return list(found.values())


def image_ids(files: Sequence[ImageFile]) -> list[int] | list[str]:
    """Numbers where all files are called by different ones, as COCO's are (000000000139.jpg: 139); else their names."""
    stems = [Path(file.name).stem for file in files]
    if all(stem.isascii() and stem.isdigit() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return [int(stem) for stem in stems]
    return [file.name for file in files]


def _files(path: str, leave_out: Path) -> Iterator[ImageFile]:
    plain = Path(path)
    if plain.is_dir():
        for file in _walk(plain, leave_out):
            yield ImageFile(file, file.relative_to(plain).as_posix())
    elif plain.is_file():
        yield ImageFile(plain, plain.name)
    elif glob.has_magic(path):
        for match in map(Path, sorted(glob.glob(path, recursive=True))):
            if _is_image(match) and leave_out not in match.resolve().parents:
                yield ImageFile(match, match.name)
    else:
        raise UserError(f"{path}: no such file or folder")


def _walk(folder: Path, leave_out: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(root) / f).resolve() != leave_out)
        yield from (file for name in sorted(names) if _is_image(file := Path(root) / name))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
