"""Command line → Config: a preset read first, then every field as a flag. Free of torch, so --help is immediate."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import select
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NoReturn, TypeVar, get_type_hints

import tyro

from detr_fabric.config import Config
from detr_fabric.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """This process's rank as its launcher (torchrun, SLURM, Fabric) tells it; 0 where there is none."""
    return int(next((os.environ[key] for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), 0))


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Ends the process quietly, with exit code 1, once nobody reads what it prints any more: COMMAND | head."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
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
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_train(argv: Sequence[str], preset: Config | None = None) -> Config:
    """The resolved Config of `python -m detr_fabric.train argv`. Exits with 2 on bad input, 0 after --help."""
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--preset")
    before.add_argument("--print-config", action="store_true")
    known, rest = before.parse_known_args(argv)
    prog = "python -m detr_fabric.train"
    try:
        default = load_preset(known.preset) if known.preset else preset or Config()
        config = parse(Config, default, rest, prog, describe_presets())
        if known.preset and config.train.name is None:
            train = dataclasses.replace(config.train, name=Path(known.preset).stem)
            config = dataclasses.replace(config, train=train)
        config = config.resolve()
    except ValueError as error:
        fail(error, everywhere=True)
    if known.print_config:
        print(" \\\n    ".join([prog, *map(shlex.join, flags(config))]))
        sys.exit(0)
    return config


def parse(kind: type[T], default: T, args: Sequence[str], prog: str, description: str) -> T:
    """tyro's parser; its help and complaints are printed by rank 0 alone."""
    with ExitStack() as silence:
        if rank() != 0:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        return tyro.cli(kind, default=default, args=list(args), prog=prog, description=description)


def load_preset(name: str) -> Config:
    """The `config` of experiments/NAME.py (./experiments first, then beside the package), or of a file FILE.py."""
    path = Path(name) if name.endswith(".py") else preset_files().get(name)
    if path is None:
        raise UserError(f"--preset {name}: no such preset; choose a file or one of {', '.join(sorted(preset_files()))}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.extend([str(Path.cwd()), str(package_parent())])  # presets import each other as experiments.NAME
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a preset is the user's own code
        raise UserError(f"--preset {name}: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UserError(f"--preset {name}: define `config = Config(...)` in it")
    return check_types(config, f"--preset {name}")


def package_parent() -> Path:
    return Path(__file__).resolve().parents[1]


def preset_files() -> dict[str, Path]:
    """Presets by name; those in ./experiments hide those beside the package."""
    folders = (package_parent() / "experiments", Path.cwd() / "experiments")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("[!_]*.py"))}


def describe_presets() -> str:
    return (
        "Trains a DETR. --preset NAME starts from one of "
        f"{', '.join(sorted(preset_files()))}; --preset FILE.py from your own; any flag changes it; "
        "--print-config shows the result as flags and ends."
    )


def check_types(config: Config, source: str) -> Config:
    """The config as read back from its own flags: dataclasses don't check their types, the command line does."""
    args = [arg for flag in flags(config) for arg in flag]
    try:
        again = parse(Config, Config(), args, source, "")
    except SystemExit as error:
        raise UserError(f"{source}: the value above is not allowed; correct it in the file") from error
    assert again == config, f"{source}: {args} does not give the same config back"
    return again


def flags(config: Config) -> Iterator[list[str]]:
    """The flags, each with its values, by which a config differs from the defaults."""
    for section in dataclasses.fields(Config):
        values, defaults = getattr(config, section.name), getattr(Config(), section.name)
        hints = get_type_hints(type(values))
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            if value == getattr(defaults, field.name):
                continue
            name = field.name.replace("_", "-")
            if hints[field.name] is bool and isinstance(value, bool):
                yield [f"--{section.name}.{name if value else 'no-' + name}"]
            else:
                items = value if isinstance(value, tuple) else (value,)
                yield [f"--{section.name}.{name}", *map(str, items)]
