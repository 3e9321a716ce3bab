"""What a run's folder says: its settings, its records over steps, epochs and hours, and the row of its results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from detr_fabric.config import Config
from detr_fabric.errors import UserError
from detr_fabric.report.runs import RunFiles
from detr_fabric.tracking.starts import STARTS

Record = dict[str, Any]
POINTS = 600  # most training records of a run in the page; of more, neighbours are averaged
FIGURES = ("step", "F1", "F1_class", "duplicates", "calibration", "tide")
SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class RunRecords(NamedTuple):
    """One run, as its folder tells. Every record has step, epoch and hours of training."""

    name: str
    config: dict[str, dict[str, Any]]  # as it was run; empty: a checkpoint alone
    training: list[Record]
    evaluations: list[Record]
    marks: list[Record]  # with `mark`: what happened there
    starts: list[Record]  # one for each time that the run was started; none in folders of earlier versions
    figures: Record = {}  # of evaluation.json, with its step, what evaluate/diagnosis.py says; empty: it says nothing


def read_run(run: RunFiles) -> RunRecords:
    """Reads the folder of a run. A line that a kill tore is left out. Raises UserError where it can't be read."""
    if run.folder is None:
        return RunRecords(run.name, {}, [], [], [], [])
    try:
        config = _config(run.folder / "config.json")
        records = _lines(run.folder / "log.jsonl")
        starts = _lines(run.folder / STARTS) if (run.folder / STARTS).exists() else []
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{run.folder}: can't be read ({reason}); name another run") from error
    add_hours(records, images_per_step(config, starts))
    training = [record for record in records if record.get("images_per_second")]
    evaluations = [record for record in records if record.get("val/AP") is not None]
    return RunRecords(
        run.name, config, training, evaluations, marks(records, starts, config), starts, _figures(run.folder)
    )


def _config(path: Path) -> dict[str, dict[str, Any]]:
    """The settings of a run; those of a later version as they are. Raises ValueError for what are none."""
    config: dict[str, dict[str, Any]] = json.loads(path.read_text())
    if not isinstance(config, dict) or not all(
        isinstance(config.get(part), dict) for part in ("attn", "model", "train")
    ):
        raise ValueError("config.json holds no settings")
    with suppress(ValueError):
        config = Config.from_dict(config).to_dict()
    return config


def _figures(folder: Path) -> Record:
    """Those of the last evaluation; empty in a run that has not ended, or of an earlier version."""
    try:
        content = json.loads((folder / "evaluation.json").read_text(), parse_constant=lambda _: None)
    except (OSError, ValueError):
        return {}
    complete = isinstance(content, dict) and all(name in content for name in FIGURES)
    return {name: content[name] for name in FIGURES} if complete else {}


def _lines(path: Path) -> list[Record]:
    """The JSON objects of a file, one a line."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line, parse_constant=lambda _: None)  # NaN and Infinity
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def images_per_step(config: Mapping[str, Mapping[str, Any]], starts: Sequence[Record]) -> int:
    """Of all ranks together: as the latest start says, else as the settings do."""
    if starts:
        return int(starts[-1]["images_per_step"])
    train = config["train"]
    return int(train["batch_size"] * train["accumulate"] * (train["devices"] or 1))


def add_hours(records: Iterable[Record], images: int) -> None:
    """Adds to each record the hours of training and evaluation up to it: steps × images a step ÷ images a second,
    and the evaluations' seconds. Pauses of a run that was stopped don't count, nor work that was lost and repeated."""
    seconds, step = 0.0, 0
    for record in records:
        if speed := record.get("images_per_second"):
            seconds += max(0, record["step"] - step) * images / speed
            step = record["step"]
        seconds += record.get("val/seconds") or 0.0
        record["hours"] = seconds / 3600


def marks(records: Sequence[Record], starts: Sequence[Record], config: Mapping[str, Mapping[str, Any]]) -> list[Record]:
    """Where the mapping took over from softmax, where the run was resumed, and where steps were dropped."""
    made = [{"mark": "resumed", **_place(records, start["step"])} for start in starts if start["step"] > 0]
    made += [{"mark": "step dropped", **_place(records, r["step"])} for r in records if "dropped_steps" in r]
    first = config.get("attn", {}).get("softmax_first")
    switch = starts[-1].get("softmax_steps") if starts else None
    if switch is None and first and records:  # a folder of an earlier version does not say at which step
        switch = round(first * (config["train"]["max_steps"] or records[-1]["step"]))
    if switch and records and switch <= records[-1]["step"]:
        made.append({"mark": f"softmax → {mapping_of(config)}", **_place(records, switch)})
    return made


def _place(records: Sequence[Record], step: int) -> Record:
    """Step, epoch and hours of a step between records, in proportion."""
    before = {"step": 0, "epoch": 0.0, "hours": 0.0}
    for record in records:
        if record["step"] >= step:
            part = (step - before["step"]) / (record["step"] - before["step"]) if record["step"] > before["step"] else 1
            return {"step": step} | {k: before[k] + part * (record[k] - before[k]) for k in ("epoch", "hours")}
        before = record
    return {"step": step, "epoch": before["epoch"], "hours": before["hours"]}


def thinned(records: Sequence[Record], most: int = POINTS) -> list[Record]:
    """At most `most` records: means of neighbours, at the place of the last of them."""
    size = math.ceil(len(records) / most)
    if size <= 1:
        return list(records)
    thin = []
    for first in range(0, len(records), size):
        group = records[first : first + size]
        keys = dict.fromkeys(key for record in group for key in record)
        values = {key: [r[key] for r in group if isinstance(r.get(key), (int, float))] for key in keys}
        means = {key: fmean(found) for key, found in values.items() if found}
        thin.append(means | {key: group[-1][key] for key in ("step", "epoch", "hours")})
    return thin


def mapping_of(config: Mapping[str, Mapping[str, Any]]) -> str:
    """The mappings of a run's attention blocks, in short."""
    attn = config["attn"]
    own = [attn[site] or attn["kind"] for site in ("encoder_self", "decoder_self", "decoder_cross")]
    return " / ".join(dict.fromkeys(own))


def best_evaluation(run: RunRecords) -> Record:
    """That with the highest AP, the first of equals, as best.ckpt is chosen; empty where there is none."""
    return max(run.evaluations, key=lambda record: record["val/AP"], default={})


def row(run: RunRecords) -> dict[str, Any]:
    """The run's row in the table, what is known of it; scores of the best evaluation, None where undefined."""
    if not run.config:
        return {}
    best, start = best_evaluation(run), run.starts[-1] if run.starts else {}
    last = max((record["step"] for record in (*run.training, *run.evaluations)), default=0)
    speeds = [record["images_per_second"] for record in run.training]
    hours = [record["hours"] for record in (*run.training[-1:], *run.evaluations[-1:])]
    scores = {name: score if (score := best.get(f"val/{name}")) is not None and score >= 0 else None for name in SCORES}
    return {
        "mapping": mapping_of(run.config),
        **scores,
        "best step": best.get("step"),
        "steps": last or None,
        "hours": max(hours, default=None),
        "images/s": median(speeds[-max(1, len(speeds) // 4) :]) if speeds else None,
        "parameters": start.get("parameters"),
        "backbone": run.config["model"]["backbone"],
        "commit": start.get("commit"),
        "device": start.get("device"),
    }
