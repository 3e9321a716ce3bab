"""Runs → what the page shows, as plain data: the table of runs, settings that differ, curves, classes.

Every number is one of log.jsonl, evaluation.json or a checkpoint; nothing is computed by the page itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detr_fabric.config import Config
from detr_fabric.report.charts import charts, rounded
from detr_fabric.report.records import RunRecords, best_evaluation, row, thinned

OWN = {"train.name", "train.run_dir", "train.resume"}  # differ between any two runs, and say nothing


def collect(runs: Sequence[RunRecords]) -> dict[str, Any]:
    """The data of the page, without attention."""
    training = [thinned(run.training) for run in runs]
    return {
        "runs": [
            {
                "name": run.name,
                "row": row(run),
                "places": {"training": places(thin), "evaluations": places(run.evaluations)},
                "averaged": -(-len(run.training) // max(1, len(thin))),
                "marks": run.marks,
            }
            for run, thin in zip(runs, training, strict=True)
        ],
        "settings": settings([run.config for run in runs]),
        "charts": charts(training, runs),
        "classes": classes(runs),
        "figures": [run.figures or None for run in runs],
    }


def places(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Where records stand, in each of the units that the page can draw over."""
    return {unit: [rounded(record[unit]) for record in records] for unit in ("step", "epoch", "hours")}


def settings(configs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The settings in which runs differ, {name, values}, None where a run has no such setting. Of a single run: those
    that differ from the defaults, whose values come first."""
    known = [config for config in configs if config]
    compared = [Config().to_dict(), *known] if len(known) == 1 else known
    names = dict.fromkeys(f"{section}.{key}" for config in compared for section in config for key in config[section])
    rows: list[dict[str, Any]] = []
    for name in names.keys() - OWN:
        section, key = name.split(".")
        values = [_text(config.get(section, {}), key) for config in compared]
        if len({*values}) > 1:
            rows.append({"name": name, "values": values})
    order = list(names)
    rows.sort(key=lambda each: order.index(each["name"]))
    heads = ["default", "this run"] if len(known) == 1 else [n for n, config in enumerate(configs) if config]
    return {"heads": heads, "rows": rows}


def _text(section: Mapping[str, Any], key: str) -> str | None:
    """A value as a reader writes it as a flag; None where there is none."""
    if key not in section:
        return None
    value = section[key]
    if isinstance(value, list):
        return " ".join(map(str, value)) or "()"
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)


def classes(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """AP by class of each run's best evaluation: {name, values}, None where it has no such class."""
    start = "val/AP_class/"
    scores = [
        {key.removeprefix(start): value for key, value in best_evaluation(run).items() if key.startswith(start)}
        for run in runs
    ]
    names = dict.fromkeys(name for each in scores for name in each)
    return [{"name": name, "values": [rounded(each.get(name)) for each in scores]} for name in names]
