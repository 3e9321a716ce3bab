"""The folder of a run: which one it is, that no second run writes to it, and that no leftovers stay in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from datetime import date
from pathlib import Path

from detr_fabric.config import Config
from detr_fabric.errors import UserError
from detr_fabric.launch import launch_id
from detr_fabric.signals import MARKER

LOCK = "run.lock"


def run_folder(cfg: Config) -> Path:
    """The folder a run writes to: named, that of the checkpoint it resumes, that which this launch had before it was
    restarted (torchrun, SLURM), or a new runs/<date>_<name>."""
    if cfg.train.run_dir is not None:
        return Path(cfg.train.run_dir)
    if cfg.train.resume not in (None, "auto"):
        return Path(str(cfg.train.resume)).parent
    launch, restarted = launch_id()
    mine = [lock.parent for lock in Path("runs").glob(f"*/{LOCK}") if restarted and owner(lock).get("launch") == launch]
    if mine:
        return max(mine, key=lambda folder: (folder / LOCK).stat().st_mtime)
    name = f"{date.today()}_{cfg.train.name}"
    taken = {path.name for path in Path("runs").glob(f"{name}*")}
    return Path("runs") / next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10**6))) if n not in taken)


class RunLock:
    """Makes a run folder this process's own for as long as it lives, however it dies.

    A POSIX record lock: loader workers don't inherit it, and network file systems know it.
    """

    def __init__(self, folder: Path) -> None:
        """Creates the folder and removes what killed processes left half written. Raises UserError when another
        process holds the folder, or when it can't be written to."""
        path = folder / LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
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
            for leftover in folder.glob("*.tmp"):
                leftover.unlink()
            (folder / MARKER).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; choose another folder with --train.run-dir") from error


def owner(lock: Path) -> dict[str, str]:
    """Who wrote a lock file, as far as it says so."""
    with suppress(OSError, ValueError):
        content = json.loads(lock.read_text())
        if isinstance(content, dict):
            return content
    return {}
