"""Files that commands write: replaced whole, and one sentence where they can't be."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from detr_fabric.errors import UserError


def check_outputs(flag: str, outputs: Iterable[Path], inputs: Iterable[str | Path | None]) -> None:
    """Raises UserError, naming the flag, where a file that a command would write is one that it reads, under whatever
    name: no command replaces its own input."""
    read = {_identity(Path(file)): file for file in inputs if file is not None} | {None: None}
    for output in outputs:
        if (file := read.get(_identity(output))) is not None:
            raise UserError(f"{flag} would overwrite {file}, which is read here; name another place")


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from others, whatever links lead to it; None where there is none."""
    with suppress(OSError, ValueError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that an earlier one is replaced whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextmanager
def writing(what: str, cure: str) -> Iterator[None]:
    """Turns what the system says of a file into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}; {cure}") from error
