"""Where the settings of a run start: a preset, the built-in scenes, or the original recipe. Free of torch.

A preset is a Python file that defines `config`. Those of the package lie in experiments/ of a checkout; an installed
package carries them inside itself, so that nothing is installed under the common name `experiments`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from detr_fabric.config import Config, TrainConfig
from detr_fabric.errors import UserError

PACKAGE = "experiments"  # by which presets import each other
DEFINES_CONFIG = re.compile(r"^config\s*[:=]", re.MULTILINE)
SCENES = "quickstart"  # the preset that fits the built-in scenes


def starting_config(preset: str | None, given: Config) -> Config:
    """The settings over which flags go. given: the flags' own values, unchecked. Raises UserError as load_preset does.

    Without a preset they are those of the run whose folder is named, else the original recipe. On the small built-in
    scenes that would be features of 2 x 2 and 1,200,000 steps: where no data is named, they are what fits the scenes.
    """
    if preset is not None:
        return load_preset(preset)
    return config_of_folder(given.train) or (scenes() if given.data.builtin else Config())


def scenes() -> Config:
    """The settings that fit the built-in scenes."""
    return _load_file(SCENES, _shipped() / f"{SCENES}.py")


def load_preset(name: str) -> Config:
    """The `config` of a preset: NAME in ./experiments or of the package, a file FILE.py, or a run's config.json.

    Raises UserError where there is none, and for a preset that fails or holds a value of a wrong type.
    """
    if name.endswith(".json"):
        return stored_config(Path(name))
    if name.endswith(".py"):
        return _load_file(name, Path(name))
    known = preset_files()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        meant = f"did you mean {close[0]}? Choose" if close else "choose"
        raise UserError(f"--preset {name}: no such preset; {meant} a file or one of {', '.join(sorted(known))}")
    return _load_file(name, known[name])


def config_of_folder(given: TrainConfig) -> Config | None:
    """The settings of the run in the folder train.run_dir, else of that whose checkpoint is train.resume; None where
    there is none yet. Raises UserError where its config.json can't be read."""
    folders = [Path(given.run_dir)] if given.run_dir else []
    folders += [Path(given.resume).parent] if given.resume else []
    files = [str(folder / "config.json") for folder in folders]
    return next((stored_config(Path(file)) for file in files if os.path.isfile(file)), None)


def stored_config(file: Path) -> Config:
    """The settings in a run's config.json, but for those of that one start: the folder, where it resumed, and that it
    accepted other settings. Raises UserError for any other file."""
    try:
        config = check_types(Config.from_dict(json.loads(file.read_text())), "its settings")
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file}: not the settings of a run ({reason}); name a --preset") from error
    once = dataclasses.replace(config.train, run_dir=None, resume=None, allow_config_change=False)
    return dataclasses.replace(config, train=once)


def flags(config: Config) -> Iterator[list[str]]:
    """The flags, each with its values, that make a config of what a command without a preset starts with."""
    base = starting_config(None, config)
    for section in dataclasses.fields(Config):
        values, defaults = getattr(config, section.name), getattr(base, section.name)
        for setting in dataclasses.fields(values):
            value = getattr(values, setting.name)
            if value == getattr(defaults, setting.name):
                continue
            name = setting.name.replace("_", "-")
            if isinstance(value, bool):
                yield [f"--{section.name}.{name if value else 'no-' + name}"]
            else:
                items = value if isinstance(value, tuple) else (value,)
                yield [f"--{section.name}.{name}", *map(str, items)]


def preset_files() -> dict[str, Path]:
    """Presets by name; those in ./experiments hide the package's."""
    files = [file for folder in (_shipped(), Path.cwd() / "experiments") for file in sorted(folder.glob("[!_]*.py"))]
    return {file.stem: file for file in files if _defines_config(file)}


def _shipped() -> Path:
    """The folder of the package's own presets: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / "experiments"
    return inside if inside.is_dir() else here.parent / "experiments"


def _defines_config(file: Path) -> bool:
    """Whether a file is a preset: a project's own folder experiments/ may hold anything."""
    with suppress(OSError):
        return DEFINES_CONFIG.search(file.read_text(errors="replace")) is not None
    return False


def run_file(path: Path, source: str) -> ModuleType:
    """A file of the user's own that defines settings. Raises UserError, which begins with `source`, where it fails."""
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{path.stem.replace('.', '_')}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{source}: give a Python file, NAME.py")
    if not path.is_file():
        raise UserError(f"{source}: no such file")
    module = importlib.util.module_from_spec(spec)
    try:
        with _neighbours(path.resolve().parent):
            spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{source}: {type(error).__name__}: {error}") from error
    return module


def _load_file(name: str, path: Path) -> Config:
    config = getattr(run_file(path, f"--preset {name}"), "config", None)
    if not isinstance(config, Config):
        raise UserError(f"--preset {name}: define `config = Config(...)` in it")
    return check_types(config, f"--preset {name}")


@contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Lets a preset import the files beside it (`import x`, `from . import x`, `from experiments import x`) and, by the
    last two, the package's presets, whatever else is called experiments. Afterwards Python imports as before."""
    path, before = sys.path.copy(), sys.modules.copy()
    for name in [name for name in before if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
    package.__path__ = [str(folder), str(_shipped())]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in sys.modules.copy().items():
            beside = Path(getattr(module, "__file__", None) or "").parent == folder and name not in before
            if beside or name.partition(".")[0] == PACKAGE:
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.partition(".")[0] == PACKAGE})


def check_types(config: Config, source: str) -> Config:
    """The config itself. Raises UserError for a value of another type than its field's: dataclasses don't check."""
    for section in dataclasses.fields(Config):
        values = getattr(config, section.name)
        for name, kind in get_type_hints(type(values)).items():
            if not _is_of(kind, value := getattr(values, name)):
                allowed = str(list(get_args(kind)) if get_origin(kind) is Literal else getattr(kind, "__name__", kind))
                raise UserError(f"{source}: {section.name}.{name} is {value!r}, not of {allowed}")
    return config


def _is_of(kind: Any, value: object) -> bool:
    """Whether a value is of a type as the config uses them: literals, plain types, tuples, and unions of these."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(args[0], each) for each in value)
    if args:
        return any(_is_of(each, value) for each in args)
    return type(value) is kind or (kind is float and type(value) is int)
