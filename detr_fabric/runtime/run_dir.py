"""The folder of a run: which one it is, that no second run writes to it, and that no leftovers stay in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from datetime import date
from itertools import count
from pathlib import Path

from lightning_fabric import Fabric

from detr_fabric.config import Config
from detr_fabric.errors import UserError
from detr_fabric.runtime.launch import launch_id
from detr_fabric.runtime.preemption import MARKER

LOCK = "run.lock"
OURS = (LOCK, "last.ckpt", "previous.ckpt")  # a folder that holds one of them is a run's
OUTPUT = {".txt", ".log", ".out", ".err"}  # of the shell or of SLURM, which may lie in a new run's folder
LEFTOVERS = ("*.ckpt.tmp", "*.jsonl.tmp", "*.json.tmp", "*.pt.tmp")  # of killed processes


def run_folder(cfg: Config) -> Path:
    """The folder a run writes to: named, that of the checkpoint it resumes, that which this launch had before it was
    restarted (torchrun, SLURM), or a new runs/<date>_<name>, which is made here so that nobody else takes it.

    Raises OSError where no folder can be made.
    """
    if cfg.train.run_dir is not None:
        return Path(cfg.train.run_dir)
    if cfg.train.resume not in (None, "auto"):
        return Path(str(cfg.train.resume)).parent
    runs, (launch, restarted) = Path("runs"), launch_id()
    mine = [lock.parent for lock in runs.glob(f"*/{LOCK}") if restarted and owner(lock).get("launch") == launch]
    if mine:
        return max(mine, key=lambda folder: (folder / LOCK).stat().st_mtime)
    runs.mkdir(exist_ok=True)
    name = f"{date.today()}_{cfg.train.name}"
    for number in count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def take_folder(fabric: Fabric, cfg: Config) -> tuple[Path, RunLock | None]:
    """The run's folder, and rank 0's lock on it. Raises UserError, on every rank alike, where another run holds it,
    where it is not a run's, or where it can't be written to."""
    folder, lock, refusal = Path(cfg.train.run_dir or "runs"), None, None
    if fabric.is_global_zero:
        try:
            folder = run_folder(cfg)
            lock = RunLock(folder)
        except UserError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"{folder}: {error.strerror}; choose another folder with --train.run-dir"
            if error.errno == errno.ENAMETOOLONG:
                refusal = f"{error.filename}: {error.strerror}; choose a shorter --train.run-dir or --train.name"
    folder, refusal = fabric.broadcast((folder, refusal))
    if refusal is not None:
        raise UserError(refusal)
    return folder, lock


class RunLock:
    """Makes a run folder this process's own for as long as it lives, however it dies.

    A POSIX record lock: loader workers don't inherit it, and network file systems know it.
    """

    def __init__(self, folder: Path) -> None:
        """Creates the folder and removes what killed processes left half written.

        Raises UserError when another process holds the folder or it is not a run's, OSError when it can't be written.
        """
        self.folder, path = folder, folder / LOCK
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
        self._file = path.open("a+")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                other = owner(path)
                raise UserError(
                    f"{folder}: process {other.get('pid', '?')} on {other.get('host', '?')} is writing to this "
                    "folder; wait for its end or choose another with --train.run-dir"
                ) from error
        # elsewhere the file system has no locks: go on without
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "launch": launch_id()[0]}))
        self._file.flush()
        for leftover in (file for pattern in LEFTOVERS for file in folder.glob(pattern)):
            leftover.unlink()
        (folder / MARKER).unlink(missing_ok=True)

    def moved_to(self) -> Path | None:
        """Where the folder is by now, if it was renamed; None where it is still here, or was removed."""
        if self._is_in(self.folder):
            return None
        with suppress(OSError):  # Linux knows the present name of an open file
            now = Path(os.readlink(f"/proc/self/fd/{self._file.fileno()}")).parent
            return now if self._is_in(now) else None
        return None

    def _is_in(self, folder: Path) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.stat(folder / LOCK), os.fstat(self._file.fileno()))
        return False


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError for a folder with files that no run has written."""
    if not any((folder / name).exists() for name in OURS):
        others = sorted(file.name for file in folder.iterdir() if file.suffix not in OUTPUT)
        if others:
            raise UserError(
                f"{folder}: holds {others[0]!r} and is not the folder of a run; name a new folder with --train.run-dir"
            )


def owner(lock: Path) -> dict[str, str]:
    """Who wrote a lock file, as far as it says so."""
    with suppress(OSError, ValueError):
        content = json.loads(lock.read_text())
        if isinstance(content, dict):
            return content
    return {}
