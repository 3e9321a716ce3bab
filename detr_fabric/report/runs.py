"""The runs that a command line names: folders, checkpoints, or folders of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from detr_fabric.errors import UserError


class RunFiles(NamedTuple):
    """Where a run's files are."""

    name: str  # of its own among the runs of a page
    folder: Path | None  # that training wrote; None: a checkpoint alone
    checkpoint: Path | None  # whose attention is shown; None: there is none yet


def find_runs(named: Sequence[str]) -> list[RunFiles]:
    """The runs, each once, in the order named. Raises UserError for what is neither a run nor a folder of runs."""
    found: list[tuple[Path | None, Path | None]] = []
    for path in map(Path, named):
        if path.is_file():
            found.append((path.parent if is_run(path.parent) else None, path))
        elif is_run(path):
            found.append((path, _checkpoint(path)))
        elif path.is_dir() and (inner := sorted(each for each in path.iterdir() if is_run(each))):
            found += [(each, _checkpoint(each)) for each in inner]
        else:
            what = (
                "holds no run (a folder with config.json and log.jsonl)" if path.is_dir() else "no such file or folder"
            )
            raise UserError(f"{path}: {what}; name a run's folder, a checkpoint or a folder of runs")
    found = list(dict.fromkeys(found))
    return [RunFiles(name, *files) for name, files in zip(_names(found), found, strict=True)]


def is_run(folder: Path) -> bool:
    """Whether training wrote to this folder."""
    return (folder / "config.json").is_file() and (folder / "log.jsonl").is_file()


def _checkpoint(folder: Path) -> Path | None:
    return next((path for name in ("best.ckpt", "last.ckpt") if (path := folder / name).is_file()), None)


def _names(found: Sequence[tuple[Path | None, Path | None]]) -> list[str]:
    """The folder's name, that of a lone file, or as much of the path as tells them apart."""
    whole = [(folder or file or Path()).absolute() for folder, file in found]
    names = [path.name if folder else path.stem for path, (folder, _) in zip(whole, found, strict=True)]
    longer = [f"{path.parent.name}/{path.name}" for path in whole]
    files = [
        f"{name} ({file.name if file else 'no checkpoint'})" for name, (_, file) in zip(longer, found, strict=True)
    ]
    for candidates in (names, longer, files):
        if max(Counter(candidates).values(), default=1) == 1:
            return candidates
    return [str(file or folder) for folder, file in found]
