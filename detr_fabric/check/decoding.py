"""Decodes all image files of a data set as training does, in parallel processes that a file may crash."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from detr_fabric.data.formats.fields import side
from detr_fabric.data.formats.orientation import read_header
from detr_fabric.errors import UserError


class FileSize(NamedTuple):
    """Of an image as training reads it."""

    height: int
    width: int
    tag: Literal["", "ignored", "turned"] = ""  # what becomes of its EXIF orientation tag


class FileProblem(NamedTuple):
    """Why training would stop at an image file."""

    kind: str  # "whose file is empty"
    detail: str  # the path, and more where it helps


def read_sizes(
    folder: Path, images: list[dict[str, Any]], workers: int, progress: Callable[[int], None]
) -> list[FileSize | FileProblem]:
    """The size of each image entry's file, or what is wrong with it, in the entries' order.

    A file that crashes its decoder is reported like any other. workers: number of processes; progress: called with the
    number of files done. Raises UserError when no process can be started.
    """
    import detr_fabric.data.images  # noqa: F401  (and torch: once here instead of in every process)

    found: list[FileSize | FileProblem | None] = [None] * len(images)
    results = _in_processes(lambda number: examine(folder, images[number]), len(images), workers)
    for done, (number, result) in enumerate(results, 1):
        found[number] = result
        progress(done)
    died = "whose file kills its decoder"
    return [
        FileProblem(died, str(folder / image["file_name"])) if result is None else result
        for image, result in zip(images, found, strict=True)
    ]


def examine(folder: Path, image: dict[str, Any]) -> FileSize | FileProblem:
    """The size of one image entry's file, or why training would stop at it."""
    from detr_fabric.data.images import read_image

    path = folder / image["file_name"]
    try:
        path.stat()
    except FileNotFoundError:  # said at once, because read_image would wait for the file to come back
        return FileProblem("whose file is missing", str(path))
    except OSError as error:
        return FileProblem("whose file cannot be read", f"{path} ({error.strerror})")
    if not os.access(path, os.R_OK):
        return FileProblem("whose file cannot be read", f"{path} (Permission denied)")
    expected, turned = (side(image.get("height")), side(image.get("width"))), image.get("turned") is True
    try:
        height, width = read_image(path, turned, expected).shape[-2:]
    except UserError as error:
        what, _, reason = str(error).removeprefix(f"{path} ").rpartition(":")[0].partition(" (")
        return FileProblem(f"whose file {what}", f"{path} ({reason}" if reason else str(path))
    if any(annotated not in (0, read) for annotated, read in zip(expected, (height, width), strict=True)):
        sizes = f"{width} x {height} in the file, {image.get('width')} x {image.get('height')} in its entry"
        return FileProblem("whose file has another size than its entry", f"{path} ({sizes})")
    header = read_header(path)
    if header is None or header.orientation == 1:
        return FileSize(height, width)
    turned = turned or (height, width) != (header.height, header.width)
    return FileSize(height, width, "turned" if turned else "ignored")


def _in_processes(function: Callable[[int], Any], count: int, workers: int) -> Iterator[tuple[int, Any]]:
    """Yields (number, function(number)) for numbers below count, in any order; None where it crashed two processes."""
    waiting = deque(range(count))
    suspects: set[int] = set()
    running: dict[Connection, tuple[BaseProcess, int]] = {}

    def give_next(connection: Connection, process: BaseProcess) -> None:
        running[connection] = process, waiting.popleft()
        with suppress(OSError):  # a process that has died is noticed below
            connection.send(running[connection][1])

    try:
        while waiting or running:
            while waiting and len(running) < workers:
                give_next(*_start(function))
            for connection in cast("list[Connection]", wait(list(running))):
                process, number = running[connection]
                try:
                    yield number, connection.recv()
                    died = False
                except (EOFError, OSError):
                    died = True
                    if number in suspects:
                        yield number, None
                    else:
                        suspects.add(number)
                        waiting.appendleft(number)
                if waiting and not died:
                    give_next(connection, process)
                else:
                    del running[connection]
                    _end(connection, process)
    finally:
        for connection, (process, _) in running.items():
            _end(connection, process)


def _start(function: Callable[[int], Any]) -> tuple[Connection, BaseProcess]:
    fork = multiprocessing.get_context("fork")  # a copy of this process imports nothing again
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_work, args=(function, theirs, ours), daemon=True)
    try:
        process.start()
    except OSError as error:
        raise UserError(f"no process can be started ({error.strerror}): use fewer --workers") from error
    theirs.close()  # otherwise we would not notice that the process has ended
    return ours, process


def _end(connection: Connection, process: BaseProcess) -> None:
    """Kills a process: closing our end would not stop it, because processes started later hold copies of that end."""
    process.kill()
    process.join()
    connection.close()


def _work(function: Callable[[int], Any], connection: Connection, other_end: Connection) -> None:
    """Answers numbers until the other end is closed. Silent, because decoders write to stderr as they please."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; the main one ends the others
    warnings.simplefilter("ignore")
    gc.freeze()
    gc.enable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        connection.send(function(number))
