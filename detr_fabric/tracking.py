"""Where a run's numbers go: log.jsonl, the truth, and Weights & Biases.

The names of the logged values are the same in both:

    train/loss                 total, weighted           lr/<group>         learning rate of a parameter group
    train/loss_ce …            raw, DETR's names         grad_norm          before clipping
    train/weighted/loss_ce …   times their weights       images_per_second  of all ranks together
    val/AP, val/AP50 …         the 12 COCO statistics    data_wait          part of the time spent waiting for data
    val/AP_class/<name>        AP of one class           memory_gb          peak on the device, in GiB
    val/seconds, val/seconds_scoring                     of an evaluation, and its part spent on scoring
    skipped_images             bad images so far, with `--data.bad-images skip`; a record with `skipped` names each
    dropped_steps              so far, at each step that was left out because something was not finite
    attention/<site>/layer<l>/<measure>, alpha/<site>/layer<l>[/head<h>]    see analysis/statistics.py

Every record also has `step` (optimizer steps done) and `epoch`. W&B gets `val/AP_table` (class, AP), `attention/heads`
(a row a head) and `val/panel` (images with predicted and true boxes) besides.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_fabric.loggers import Logger
from lightning_fabric.utilities.rank_zero import rank_zero_only

from detr_fabric.pictures import Boxes, Picture
from detr_fabric.progress import Values

WandbMode = Literal["online", "offline", "disabled"]

INIT_TIMEOUT = 30.0  # seconds that a start may wait for W&B's server before the run goes offline
FINISH_TIMEOUT = 60.0  # seconds that the end of a run may wait for the last uploads


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


class RunLog:
    """log.jsonl: one JSON object a record, handed to the system at once.

    Opened for a resumed run, it first drops what came after `resumed_step` and the line that a kill tore, so every step
    is there once. A full disk costs records and one warning through `say`, not the run; a folder that was removed is
    made again. Numbers that are not finite become null.
    """

    def __init__(self, path: Path, resumed_step: int, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._torn = self._warned = False
        _cut(path, resumed_step)
        self._file = path.open("ab", buffering=0)  # one system call a record: a kill tears one line at most

    def write(self, values: Values, step: int, epoch: float) -> None:
        record = {"step": step, "epoch": epoch, **values}
        strict = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        line = b"\n" * self._torn + json.dumps(strict).encode() + b"\n"
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                removed, self._file = self._file, self._path.open("ab", buffering=0)
                removed.close()
                self._say(f"{self._path}: removed by somebody; training goes on, with new records from step {step}")
            self._torn = self._file.write(line) < len(line)
        except OSError as error:
            self._torn = True
            if not self._warned:
                self._say(f"{self._path}: {error.strerror}; training goes on, but records are missing from step {step}")
                self._warned = True

    def close(self) -> None:
        self._file.close()


def _cut(path: Path, last_step: int) -> None:
    """Drops torn lines and the records after last_step; a kill meanwhile leaves the old log or the new one."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= last_step]
    if kept != lines:
        new = path.with_name(path.name + ".tmp")
        with new.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class WandbLogger(Logger):
    """A W&B run behind Fabric's Logger interface, on rank 0 only. It starts at its first use, after fabric.launch().

    mode: None is online where W&B finds a key (or what `wandb offline` and WANDB_MODE say), else offline.
    Nobody is ever asked anything and nothing here stops a run: what goes wrong is one line through `say`, and a run
    that can't start online starts offline. log.jsonl has every number in any case.
    config: the whole configuration as nested dicts; parameters: their counts by name; commit: from git_commit().
    run_id: of the run to resume. The attribute of that name belongs in the checkpoint.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        *,
        mode: WandbMode | None,
        project: str,
        entity: str | None,
        name: str | None,
        group: str | None,
        tags: Sequence[str],
        run_id: str | None,
        commit: str | None,
        parameters: Mapping[str, int],
        say: Callable[[str], None],
    ) -> None:
        self.run_id = run_id or secrets.token_hex(4)
        self._mode, self._project, self._commit, self._say = mode, project, commit, say
        self._start_arguments: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name,
            "group": group,
            "tags": tuple(tags),
            "dir": str(run_dir),
            "config": {**config, "git_commit": commit, "parameters": dict(parameters)},
            "save_code": False,
            "resume": "allow",
        }
        self._run: Any = None
        self._off = mode == "disabled"
        self._warned = False

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self.run_id

    def log_metrics(self, metrics: Values, step: int | None = None) -> None:  # type: ignore[override]
        """Logs values under their names; `step` is one of them, and the x axis of all."""
        self._use(lambda run: run.log(_with_step(metrics, step)))

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Adds to the run's configuration."""
        self._use(lambda run: run.config.update(dict(params), allow_val_change=True))

    def log_pictures(self, name: str, pictures: Sequence[Picture], class_names: Sequence[str], step: int) -> None:
        """Logs images with their predicted and true boxes, which W&B can switch on and off and filter by score."""
        names = dict(enumerate(class_names))
        self._use(lambda run: run.log(_with_step({name: [_image(picture, names) for picture in pictures]}, step)))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Logs a table that can be sorted and plotted in W&B."""
        self._use(lambda run: run.log(_with_step({name: _table(columns, rows)}, step)))

    def mark_preempting(self) -> None:
        """Tells W&B that the machine is about to be taken away and the run will come back."""
        if self._run is not None:
            self._use(lambda run: run.mark_preempting())

    def finalize(self, status: str) -> None:
        """Ends the run, as failed unless status is "success"; waits FINISH_TIMEOUT for uploads at most."""
        if self._run is not None:
            self._use(lambda run: run.finish(exit_code=0 if status == "success" else 1))
        self._run, self._off = None, True

    def _use(self, action: Callable[[Any], object]) -> None:
        """Does something with the run if there is one to be had; a failure costs what was to be logged."""
        if self._off or getattr(rank_zero_only, "rank", 0) != 0:
            return
        if self._run is None:
            self._start()
        try:
            if self._run is not None:
                action(self._run)
        except Exception as error:  # whatever a logging service does, it must not end days of training
            if not self._warned:
                self._say(f"W&B: {_first_line(error)}; training goes on, log.jsonl has what W&B misses")
                self._warned = True

    def _start(self) -> None:
        """Starts the run as its mode says, else offline, else never."""
        modes: tuple[WandbMode | None, ...] = ("offline",) if self._mode == "offline" else (self._mode, "offline")
        for mode in modes:
            try:
                run = self._init(mode)
            except Exception as error:
                self._say(f"W&B: {_first_line(error)} {'Going without.' if mode == 'offline' else 'Trying offline.'}")
                continue
            if run.disabled:  # by WANDB_MODE
                break
            self._run, self.run_id = run, run.id
            place = f"offline; send it with: wandb sync {run.settings.sync_dir}" if run.offline else run.url
            self._say(f"W&B: {place}")
            return
        self._off = True

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


def _with_step(values: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    return dict(values) if step is None else {**values, "step": step}


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def _image(picture: Picture, names: dict[int, str]) -> Any:
    import wandb

    sides = {"predictions": picture.predicted, "ground_truth": picture.true}
    boxes = {
        side: {"box_data": _box_data(found, names), "class_labels": names}
        for side, found in sides.items()
        if found is not None
    }
    return wandb.Image(picture.image.permute(1, 2, 0).numpy(), caption=picture.caption, boxes=boxes)


def _box_data(found: Boxes, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Boxes in W&B's format, in pixels."""
    corners, labels = found.boxes.tolist(), found.labels.tolist()
    rows: list[dict[str, Any]] = [
        {
            "position": dict(zip(("minX", "minY", "maxX", "maxY"), box, strict=True)),
            "domain": "pixel",
            "class_id": label,
            "box_caption": names[label],
        }
        for box, label in zip(corners, labels, strict=True)
    ]
    if found.scores is not None:
        for row, score in zip(rows, found.scores.tolist(), strict=True):
            row |= {"box_caption": f"{row['box_caption']} {score:.2f}", "scores": {"score": score}}
    return rows
