"""Processes of their own, forked from one that has imported torch once."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

NURSERY = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from detr_fabric.config import Config, WandbConfig
from detr_fabric.tracking import wandb as wandb_logger
from detr_fabric.tracking.console import Progress
from detr_fabric.tracking.wandb import WandbLogger

def start(mode):
    say = lambda text: print(text, flush=True)
    return WandbLogger(Config(wandb=WandbConfig(mode=mode)), Path("run"), None, {}, say)

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(250)
        os.chdir(job["folder"])
        os.environ.clear()
        os.environ.update(job["environment"])
        for number, path in enumerate(job["streams"]):
            os.dup2(os.open(path, os.O_RDWR if number == 0 else os.O_WRONLY | os.O_CREAT), number)
        exec(job["code"])
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def run_process(nursery: subprocess.Popen[str], home: Path, code: str, streams: dict[int, str] | None = None) -> Done:
    """Runs code in a new process in `home`; its standard streams are /dev/null and files unless named."""
    paths = {0: os.devnull, 1: str(home / "stdout"), 2: str(home / "stderr")} | (streams or {})
    job = {
        "folder": str(home),
        "environment": dict(os.environ),
        "streams": [paths[n] for n in range(3)],
        "code": code,
    }
    assert nursery.stdin is not None and nursery.stdout is not None
    nursery.stdin.write(json.dumps(job) + "\n")
    exit_code = int(nursery.stdout.readline())
    out, err = (path.read_text() if (path := home / name).is_file() else "" for name in ("stdout", "stderr"))
    return Done(exit_code, out, err)
