"""What a command prints: one function through which every line passes, and a count of what is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from detr_fabric.launcher import rank

PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep", "skis": "skis"}
PLURALS |= {"scissors": "scissors", "broccoli": "broccoli"}
JOINERS = "\u200c\u200d"  # letters of some scripts and emoji are joined by them


def say(text: str = "", to: TextIO | None = None) -> None:
    """Prints one line, on standard output unless told otherwise, whatever is in it and whatever the terminal shows.

    Names of files and classes come from strangers: what would control the terminal is printed as an escape, and so is
    what its encoding lacks.
    """
    stream = to or sys.stdout
    stream.write(encodable(printable(text), stream) + "\n")
    stream.flush()


def printable(text: str) -> str:
    """Text on one line in which control characters, line breaks too, are escapes."""
    return "".join(char if char.isprintable() or char in JOINERS else ascii(char)[1:-1] for char in text)


def encodable(text: str, stream: TextIO) -> str:
    """Text in which the characters that a stream can't encode are escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def noun(name: str, count: int) -> str:
    """What `count` things of an English name are called: class, classes."""
    return name if count == 1 else plural(name)


def plural(name: str) -> str:
    """Several things of a class with an English name; other names stay as they are.

    >>> [plural(name) for name in ("dog", "bus", "bench", "cherry", "person", "class 3", "Straße")]
    ['dogs', 'buses', 'benches', 'cherries', 'people', 'class 3', 'Straße']
    """
    if name in PLURALS or not (name.isascii() and name[-1:].isalpha()):
        return PLURALS.get(name, name)
    if name.endswith(("s", "x", "z", "ch", "sh")):
        return f"{name}es"
    return f"{name[:-1]}ies" if name.endswith("y") and name[-2:-1] not in "aeiou" else f"{name}s"


def decimal(value: float, places: int = 3) -> str:
    """A score as people read it; – where it is undefined (-1), because there is no object."""
    return "–" if value < 0 else f"{value:.{places}f}"


@contextmanager
def counted(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Counts what is done of `total`, in one line of a terminal (stderr). Silent elsewhere and on other ranks."""
    if rank() != 0 or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), TimeRemainingColumn())
    last = 0.0
    # No thread of its own: processes are forked from this one.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def draw(done: int) -> None:
            nonlocal last
            bar.update(task, completed=done)
            if done == total or time.monotonic() - last > 0.1:
                last = time.monotonic()
                bar.refresh()

        yield draw
