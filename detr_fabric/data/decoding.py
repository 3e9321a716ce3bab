"""All image files of a data set, decoded as training decodes them, in parallel processes that may die of it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import stat
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, cast

from detr_fabric.data.columns import side
from detr_fabric.errors import UserError

Size = tuple[int, int]  # height, width


class FileFault(NamedTuple):
    """Why training would stop at an image file."""

    kind: str  # "whose file is empty"
    detail: str  # the path, and more where it helps


def read_sizes(
    folder: Path, images: list[dict[str, Any]], workers: int, progress: Callable[[int], None]
) -> list[Size | FileFault]:
    """(height, width) of the files of image entries, or what is wrong with them, in the entries' order.

    A file that kills its decoder is a fault like others. workers: processes; progress is told how many files are done.
    Raises UserError when no process can be started.
    """
    import detr_fabric.data.images  # noqa: F401  (and torch: once here, not in every process)

    found: list[Size | FileFault | None] = [None] * len(images)
    results = _in_processes(lambda number: examine(folder, images[number]), len(images), workers)
    for done, (number, result) in enumerate(results, 1):
        found[number] = result
        progress(done)
    died = "whose file kills its decoder"
    return [
        FileFault(died, str(folder / image["file_name"])) if result is None else result
        for image, result in zip(images, found, strict=True)
    ]


def examine(folder: Path, image: dict[str, Any]) -> Size | FileFault:
    """The (height, width) of one image entry's file, unless training would stop at it."""
    from detr_fabric.data.images import read_image

    path = folder / image["file_name"]
    try:
        status = path.stat()
    except FileNotFoundError:  # at once: read_image would wait for it to come back
        return FileFault("whose file is missing", str(path))
    except OSError as error:
        return FileFault("whose file cannot be read", f"{path} ({error.strerror})")
    if not stat.S_ISREG(status.st_mode):
        return FileFault("whose file is a folder or a device", str(path))
    if not os.access(path, os.R_OK):
        return FileFault("whose file cannot be read", f"{path} (Permission denied)")
    if status.st_size == 0:
        return FileFault("whose file is empty", str(path))
    try:
        height, width = read_image(path).shape[-2:]
    except UserError as error:
        what, _, reason = str(error).removeprefix(f"{path} ").rpartition(":")[0].partition(" (")
        return FileFault(f"whose file {what}", f"{path} ({reason}" if reason else str(path))
    expected = side(image.get("height")), side(image.get("width"))
    if any(annotated not in (0, read) for annotated, read in zip(expected, (height, width), strict=True)):
        sizes = f"{width} x {height} in the file, {image.get('width')} x {image.get('height')} in its entry"
        return FileFault("whose file has another size than its entry", f"{path} ({sizes})")
    return height, width


def _in_processes(function: Callable[[int], Any], count: int, workers: int) -> Iterator[tuple[int, Any]]:
    """(number, function(number)) for numbers below count, in any order; None where two processes died of it."""
    waiting = deque(range(count))
    suspects: set[int] = set()
    running: dict[Connection, tuple[BaseProcess, int]] = {}

    def give_next(connection: Connection, process: BaseProcess) -> None:
        running[connection] = process, waiting.popleft()
        with suppress(OSError):  # a process that died meanwhile is noticed below
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
    fork = multiprocessing.get_context("fork")  # a copy of this process: nothing is imported or sent again
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_work, args=(function, theirs, ours), daemon=True)
    try:
        process.start()
    except OSError as error:
        raise UserError(f"no process can be started ({error.strerror}): lower --workers") from error
    theirs.close()  # else its end would not be noticed
    return ours, process


def _end(connection: Connection, process: BaseProcess) -> None:
    """Ends a process without its doing: younger ones hold copies of our end, so that closing it tells it nothing."""
    process.kill()
    process.join()
    connection.close()


def _work(function: Callable[[int], Any], connection: Connection, other_end: Connection) -> None:
    """Answers numbers until the other end is closed, silently: decoders write to stderr as they please."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; the first one ends the others
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
