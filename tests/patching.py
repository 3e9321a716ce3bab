"""Replaces functions of modules and classes, and fails if nothing calls the replacement.

A test whose patch sits on a name that the code no longer calls would pass without testing anything.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from typing import Any

EXIT_NOT_CALLED = 70  # of a process in which nothing called what patch() put there

Patch = Callable[[Any, str, Callable[..., Any]], None]

_not_called: set[str] = set()


@contextmanager
def patched(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Within the block owner.name is `replacement`. Tests use it through the fixture `patch`."""
    original, missing = getattr(owner, name), set[str]()
    _replace(owner, name, replacement, missing)
    try:
        yield
    finally:
        setattr(owner, name, original)
    assert not missing, _sentence(missing)


def patch(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """From now on owner.name is `replacement` in this process, which fails at its end if nothing has called it."""
    if not _not_called:
        Finalize(None, _fail_if_not_called, exitpriority=0)  # at exit, also of a process forked by multiprocessing
    _replace(owner, name, replacement, _not_called)


def _replace(owner: Any, name: str, replacement: Callable[..., Any], not_called: set[str]) -> None:
    label = f"{owner.__name__}.{name}"

    @functools.wraps(getattr(owner, name))
    def watched(*args: Any, **kwargs: Any) -> Any:
        not_called.discard(label)
        return replacement(*args, **kwargs)

    setattr(owner, name, watched)
    not_called.add(label)


def _sentence(not_called: set[str]) -> str:
    return f"replaced, but nothing called it: {', '.join(sorted(not_called))}"


def _fail_if_not_called() -> None:
    if _not_called:
        print(_sentence(_not_called), file=sys.stderr, flush=True)
        os._exit(EXIT_NOT_CALLED)
