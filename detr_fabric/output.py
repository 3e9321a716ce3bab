"""Files that commands write: replaced whole, and one sentence where they can't be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detr_fabric.errors import UserError


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
