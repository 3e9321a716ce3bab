"""Command lines, one way for all: a field is a flag, the sentence below it the help. Free of torch, so --help is fast.

A command names its settings, a dataclass whose positional fields are marked as such, and `parse` does the rest.
"""

from __future__ import annotations

import dataclasses
import io
import os
import select
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from functools import cache, partial
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import (
    MISSING,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from detr_fabric.errors import UserError
from detr_fabric.launcher import rank
from detr_fabric.terminal import say

T = TypeVar("T")

PREFIXLESS = tyro.conf.arg(name="")  # marks a section whose flags do not begin with its name
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")


@contextmanager
def entry_point() -> Iterator[None]:
    """Around a command: a UserError is one sentence and exit code 2, Ctrl+C is exit code 130, no encoding of the
    terminal ends it, and it ends quietly, with 1, once nobody reads what it prints any more (COMMAND | head)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):  # it was a file when Python started and is a pipe now
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr, for what does not pass through say()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):  # some other pipe is broken
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(1)


def fail(error: Exception, everywhere: bool = False) -> NoReturn:
    """Ends the process with one sentence and exit code 2; what fails on every rank is said by rank 0 alone."""
    if everywhere and rank() != 0:
        time.sleep(5)  # a launcher kills the others as soon as one ends: let rank 0 speak first
    else:
        say(f"error: {error}", sys.stderr)
    sys.exit(2)


def parse(kind: type[T], args: Sequence[str], prog: str, about: str, start: Callable[[T], T] | None = None) -> T:
    """The settings that a command line asks for. Ends the process with 2 on bad input, with 0 after --help.

    start: what the flags go over, given the settings as the flags alone make them, not checked yet: a preset or a
    checkpoint that is named there supplies the rest. None: the defaults. It may raise UserError.
    """
    try:
        args = plain(kind, args)
        given = _tyro(kind, None, args, prog, about)
        return checked(given if start is None else _tyro(kind, start(given), args, prog, about))
    except UserError as error:
        fail(error, everywhere=True)


def checked(settings: T) -> T:
    """The same settings, made as Python makes them, which checks their values. Raises UserError."""
    assert dataclasses.is_dataclass(settings) and not isinstance(settings, type)
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    made = {name: checked(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
    return type(settings)(**made)


def plain(kind: type, args: Sequence[str]) -> list[str]:
    """Arguments in which every boolean is --x or --no-x, whether they said so, or --x True, or --x=false.

    Raises UserError for a flag that there is not, with the one that was probably meant.
    """
    known = _flags(kind)
    result, waiting = list[str](), list(reversed(args))
    while waiting:
        arg = waiting.pop()
        flag, equals, value = arg.partition("=")
        flag = flag.replace("_", "-")
        switch = known.get(flag)
        if switch is None:
            if arg.startswith("--") and flag not in known:
                raise UserError(f"{flag}: no such flag{_suggestion(flag, known)}")
            result.append(arg)
            continue
        if not equals and waiting and waiting[-1].lower() in ("true", "false"):
            value = waiting.pop()
        elif equals and value.lower() not in ("true", "false"):
            raise UserError(f"{arg}: give True or False")
        result.append(switch[value.lower() == "false"])
    return result


def _suggestion(flag: str, known: Iterable[str]) -> str:
    ending = [name for name in known if name.endswith(f".{flag.lstrip('-')}")]  # --lr for --optim.lr
    close = ending or get_close_matches(flag, known, n=1)
    return f": did you mean {' or '.join(close)}?" if close else "; --help lists all"


def _flags(kind: type, prefix: str = "") -> dict[str, tuple[str, str] | None]:
    """Every flag; of a boolean, --x and --no-x, with what stands for True and for False."""
    found: dict[str, tuple[str, str] | None] = dict.fromkeys(["--help", *COMPLETION])
    for name, hint in get_type_hints(kind, include_extras=True).items():
        bare, *marks = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        dashed = name.replace("_", "-")
        on, off = f"--{prefix}{dashed}", f"--{prefix}no-{dashed}"
        if dataclasses.is_dataclass(bare):
            assert isinstance(bare, type)
            found |= _flags(bare, prefix if PREFIXLESS in marks else f"{prefix}{dashed}.")
        elif bare in (bool, bool | None):
            found |= {on: (on, off), off: (off, on)}
        elif tyro.conf.Positional not in marks:
            found[on] = None
    return found


def _tyro(kind: type[T], default: T | None, args: list[str], prog: str, about: str) -> T:
    """tyro's parser, which makes settings without checking them; its help and complaints are rank 0's alone."""
    width = shutil.get_terminal_size().columns
    # tyro does not wrap the description, and joins its lines unless they are indented
    fill = partial(textwrap.fill, width=width, initial_indent=" ", subsequent_indent=" ", break_on_hyphens=False)
    description = "\n".join(fill(" ".join(part.split())) for part in about.split("\n\n"))
    with ExitStack() as silence:
        if rank() != 0:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        return tyro.cli(
            kind,
            default=MISSING if default is None else default,
            args=args,
            prog=prog,
            description=description,
            registry=_registry(),
        )


@cache
def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.struct_rule(_section)
    return registry


def _section(info: StructTypeInfo) -> StructConstructorSpec | None:
    """How tyro sees a dataclass: values are checked later, help wraps anywhere, booleans that may be unset are switches
    like others."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    fields = []
    for f in dataclasses.fields(info.type):
        hint = hints[f.name]
        if hint == bool | None:
            hint = Annotated[hint, tyro.conf.DisallowNone]
        if isinstance(info.default, info.type):
            default = getattr(info.default, f.name)
        elif f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        else:
            default = MISSING if f.default is dataclasses.MISSING else f.default
        if default == ():
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="(default: none)")]
        section = default.__doc__ if dataclasses.is_dataclass(default) else None
        fields.append(StructFieldSpec(f.name, hint, default, section or partial(_help, info.type, f.name)))
    return StructConstructorSpec(partial(_unchecked, info.type), tuple(fields))


def _unchecked(kind: type, /, **values: Any) -> Any:
    made: Any = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _help(kind: type, name: str) -> str | None:
    return _sentences(kind).get(name)


@cache
def _sentences(kind: type) -> dict[str, str]:
    """The sentences below the fields of a dataclass, each on one line."""
    found = docstring_parser.parse_from_object(kind).params
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in found}
