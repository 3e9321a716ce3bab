"""What a paper needs of an analysis: records of every image and every matched pair as CSV, and two tables of them.

images.csv    one row a model, image, site and layer; measures are means over heads
pairs.csv     one row a model, image and matched pair of the last layer
measures.*    by layer: mean ± standard deviation over images
paibb.*       attention inside the true box, overall and by COCO's sizes: mean over pairs ± standard deviation over the
              means of images
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from detr_fabric.analysis.statistics import AttentionStatistics, ImageRecord, PairRecord
from detr_fabric.analysis.tables import Table, Value, summarize, write_csv

SIZES = {"all": (0, math.inf), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}  # areas
MEASURES = {
    "zeros": ("zeros", 3),
    "zeros to 1e-6": ("near_zeros", 3),
    "Gini by row": ("gini_rows", 3),
    "Gini of the map": ("gini", 3),
    "keys": ("support", 1),
}


def write_records(folder: Path, models: Mapping[str, AttentionStatistics]) -> None:
    """All files, for the statistics of models by name. Raises OSError."""
    images = [[name, *record] for name, statistics in models.items() for record in statistics.image_records]
    pairs = [[name, *pair, size_of(pair)] for name, statistics in models.items() for pair in statistics.pair_records]
    write_csv(folder / "images.csv", ["model", *ImageRecord._fields], images)
    write_csv(folder / "pairs.csv", ["model", *PairRecord._fields, "size"], pairs)
    measure_table(models).write(folder, "measures")
    paibb_table(models).write(folder, "paibb")


def size_of(pair: PairRecord) -> str:
    """COCO's word for an object's area."""
    return next(name for name, (low, high) in SIZES.items() if name != "all" and low <= pair.area < high)


def measure_table(models: Mapping[str, AttentionStatistics]) -> Table:
    """A row for each model, site and layer, which counts from 1 as in papers."""
    rows = []
    for name, statistics in models.items():
        groups: dict[tuple[str, int], list[ImageRecord]] = {}
        for record in statistics.image_records:
            groups.setdefault((record.site, record.layer), []).append(record)
        for (site, layer), records in groups.items():
            values = [summarize([getattr(record, field) for record in records]) for field, _ in MEASURES.values()]
            rows.append(([name, site, str(layer + 1)], values))
    return Table(("model", "site", "layer"), {title: places for title, (_, places) in MEASURES.items()}, rows)


def paibb_table(models: Mapping[str, AttentionStatistics]) -> Table:
    """Ours (each head, exact cells) and that of the head-averaged enlarged map, for each model and size."""
    rows = []
    for name, statistics in models.items():
        for size in SIZES:
            pairs = [pair for pair in statistics.pair_records if size in ("all", size_of(pair))]
            values = [_over_images(pairs, "paibb"), _over_images(pairs, "paibb_enlarged")]
            rows.append(([name, size, str(len(pairs))], values))
    return Table(("model", "objects", "pairs"), {"PAIBB": 3, "PAIBB, enlarged head average": 3}, rows)


def _over_images(pairs: Sequence[PairRecord], field: str) -> Value | None:
    images: dict[int | str, list[float]] = {}
    for pair in pairs:
        images.setdefault(pair.image_id, []).append(getattr(pair, field))
    spread = summarize([sum(values) / len(values) for values in images.values()])
    mean = summarize([value for values in images.values() for value in values])
    return Value(mean.mean, spread.deviation) if mean is not None and spread is not None else None
