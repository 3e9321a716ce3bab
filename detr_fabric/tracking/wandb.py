"""Weights & Biases: what log.jsonl holds, and pictures and tables. Nothing here stops a run or holds it up."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detr_fabric.config import Config, TrainConfig, WandbMode
from detr_fabric.draw import Picture
from detr_fabric.errors import UserError
from detr_fabric.runtime.contents import RUN_ID
from detr_fabric.runtime.elastic import children
from detr_fabric.tracking.background import Background
from detr_fabric.tracking.console import Values
from detr_fabric.tracking.media import wandb_image, wandb_table

INIT_TIMEOUT = 30.0  # seconds that a start may wait for W&B's server before the run goes offline
FINISH_TIMEOUT = 60.0  # seconds that the end of a run may wait for the last uploads
GRACE = 15.0  # seconds more, after which W&B itself hangs
CAPACITY = 256  # things that may wait to be logged
PROJECT = "detr_fabric"


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit that `folder` is checked out from, with "-dirty" if it was changed since; None where there is none."""
    git = ["git", "-C", str(folder)]
    tracked = [*git, "ls-files", "--error-unmatch", "."]  # an installed package may lie inside somebody else's checkout
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # set inside hooks
    try:
        for command in (tracked, describe):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


class WandbLogger:
    """A W&B run, on rank 0. It starts at its first use.

    Nobody is ever asked anything. What goes wrong is one line through `say`, and a run that can't start online starts
    offline; log.jsonl has every number in any case. W&B is used in a thread of its own, with limits in time: a service
    that hangs costs what was to be logged. Where no flag says otherwise, W&B's environment variables count.
    """

    def __init__(
        self, cfg: Config, folder: Path, run_id: str | None, facts: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        """folder: of the run. run_id: of the W&B run to resume; the attribute of that name belongs in the checkpoint.
        facts: what else belongs to the configuration; of them git_commit, from git_commit(), W&B shows apart.

        Raises UserError for a WANDB_RUN_ID that can be none.
        """
        env, wandb = os.environ, cfg.wandb
        self.run_id = run_id or env.get("WANDB_RUN_ID") or secrets.token_hex(4)
        if RUN_ID.fullmatch(self.run_id) is None:
            raise UserError(
                f"WANDB_RUN_ID {self.run_id!r}: an id has at most 128 characters, none of them / \\ # ? % :"
            )
        self._mode, self._commit, self._say = wandb.mode, facts.get("git_commit"), say
        if wandb.mode is None and env.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
            self._mode = "disabled"
        self._start_arguments: dict[str, Any] = {
            "project": wandb.project or env.get("WANDB_PROJECT") or PROJECT,
            "entity": wandb.entity,
            "name": wandb.name or env.get("WANDB_NAME") or _default_name(cfg),
            "group": wandb.group,
            "tags": wandb.tags or None,  # None: as WANDB_TAGS says
            "dir": None if env.get("WANDB_DIR") else str(folder),
            "config": {**cfg.to_dict(), **facts},
            "save_code": False,
            "resume": "allow",
        }
        self._off, self._warned = self._mode == "disabled", False
        self._worker: Background | None = None
        self._run: Any = None  # once it has started; only the worker touches it
        self._sentences: deque[str] = deque()  # of the worker

    def log_metrics(self, metrics: Values, step: int) -> None:
        """Logs values under their names; `step` is one of them, and the x axis of all."""
        self._use(lambda run: run.log({**metrics, "step": step}))

    def log_pictures(self, name: str, pictures: Sequence[Picture], class_names: Sequence[str], step: int) -> None:
        """Logs images with their predicted and true boxes, which W&B can switch on and off and filter by score."""
        names = dict(enumerate(class_names))
        self._use(lambda run: run.log({name: [wandb_image(picture, names) for picture in pictures], "step": step}))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Logs a table that can be sorted and plotted in W&B."""
        self._use(lambda run: run.log({name: wandb_table(columns, rows), "step": step}))

    def mark_preempting(self) -> None:
        """Tells W&B that the machine is about to be taken away and the run will come back."""
        if self._worker is not None:
            self._use(lambda run: run.mark_preempting())

    def finalize(self, status: str) -> None:
        """Ends the run, as failed unless status is "success". Waits for uploads, but not for ever."""
        if self._worker is not None and not self._off:
            finish = partial(self._do, lambda run: run.finish(exit_code=0 if status == "success" else 1))
            if not self._worker.finish(finish, FINISH_TIMEOUT + GRACE):
                self._warn("it does not end")
                _abandon_service()
            self._tell()
        self._off = True

    def _use(self, action: Callable[[Any], object]) -> None:
        """Does something with the run, if there is one to be had, later."""
        if self._off:
            return
        if self._worker is None:
            self._worker, started = Background(CAPACITY), threading.Event()
            self._worker.submit(partial(self._start, started))
            if not started.wait(2 * INIT_TIMEOUT + GRACE):
                self._warn("it does not start")
        if not self._worker.submit(partial(self._do, action)):
            self._warn("it does not answer")
        self._tell()

    def _do(self, action: Callable[[Any], object]) -> None:
        """In the worker. A failure costs what was to be logged."""
        try:
            if self._run is not None:
                action(self._run)
        except Exception as error:  # whatever a logging service does, it must not end days of training
            self._warn(_first_line(error))

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._sentences.append(f"W&B: {reason}; training goes on, log.jsonl has what W&B misses")

    def _tell(self) -> None:
        """Says what the worker has to say, in the thread that owns the console."""
        while self._sentences:
            self._say(self._sentences.popleft())

    def _start(self, started: threading.Event) -> None:
        """In the worker: starts the run as its mode says, else offline, else never."""
        modes: tuple[WandbMode | None, ...] = ("offline",) if self._mode == "offline" else (self._mode, "offline")
        for mode in modes:
            try:
                run = self._init(mode)
            except Exception as error:
                more = "Going without." if mode == "offline" else "Trying offline."
                self._sentences.append(f"W&B: {_first_line(error)} {more}")
                continue
            if not run.disabled:  # by WANDB_MODE
                self._run = run
                place = f"offline; send it with: wandb sync {run.settings.sync_dir}" if run.offline else run.url
                self._sentences.append(f"W&B: {place}")
            break
        self._off = self._run is None
        started.set()

    def _init(self, mode: WandbMode | None) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,  # no diff of the checkout; the commit alone is sent
            git_commit=self._commit and self._commit.removesuffix("-dirty"),
            allow_val_change=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            x_transaction_log_flush_interval=1.0,  # a kill offline loses this much; the default is 15 s
        )
        try:
            with _nobody_to_ask():
                run = wandb.init(id=self.run_id, mode=mode, settings=settings, **self._start_arguments)
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        except Exception:
            wandb.teardown()  # else a second try hears that the run id is in use
            raise
        return run


def _abandon_service() -> None:
    """Ends W&B's service, and that the end of this process waits for it."""
    for pid in children("wandb-core"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    Background(1).finish(_forget_service, GRACE)


def _forget_service() -> None:
    import wandb

    with contextlib.suppress(Exception):  # it finds the service dead
        wandb.teardown()


@contextlib.contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """W&B asks for a key where standard input is a terminal; a run in tmux would wait for the answer all night."""
    keyboard = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = keyboard


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _default_name(cfg: Config) -> str:
    """The run's own name, with the seed where it is not the usual one: repetitions can be told apart."""
    name, seed = cfg.train.name or PROJECT, f"seed{cfg.train.seed}"
    return name if cfg.train.seed == TrainConfig().seed or seed in name else f"{name}-{seed}"
