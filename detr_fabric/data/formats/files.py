"""Finds and reads the files of a data set."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from detr_fabric.errors import UserError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
)
MAX_BYTES = 2**30  # no image of as many pixels as images.py accepts is larger


def walk(folder: Path, suffixes: tuple[str, ...], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files below a folder with one of these suffixes in any case, without hidden files and folders.

    Links to folders are followed, unless they lead back to a folder `above` (real paths). Raises UserError for a folder
    that cannot be read.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): check the folder") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from walk(Path(entry.path), suffixes, above | {real})
        elif entry.name.lower().endswith(suffixes):
            yield Path(entry.path)


def stem_in(folder: Path, file: Path) -> str:
    """The path of a file inside a folder, with slashes and without the suffix: sub/x_jpg.rf.1234."""
    return file.relative_to(folder).with_suffix("").as_posix()


def open_image(file: Path) -> BinaryIO:
    """Opens a file of which all bytes can be read, which pipes and devices never promise.

    Raises OSError, and UserError for a pipe, a device, a folder, an empty file, and one larger than MAX_BYTES.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status, wrong = os.fstat(descriptor), None
    if not stat.S_ISREG(status.st_mode):
        wrong = "is a folder or a device: replace it by an image file"
    elif status.st_size == 0:
        wrong = "is empty: replace the file"
    elif status.st_size > MAX_BYTES:
        wrong = f"is larger than {MAX_BYTES // 2**20} MB: replace the file"
    if wrong is not None:
        os.close(descriptor)
        raise UserError(f"{file} {wrong}")
    return os.fdopen(descriptor, "rb")


def read_text(file: Path) -> str:
    """The text of a UTF-8 file. Raises UserError if it can't be read."""
    try:
        return file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): check the file") from error
