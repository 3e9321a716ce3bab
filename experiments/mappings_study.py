"""What the mapping of attention scores costs and gives: every mapping on quickstart, three seeds.

    python -m detr_fabric.study experiments/mappings_study.py

All but softmax train with softmax for the first half of the steps. Cost: 5 to 8 minutes a cell on one CPU core, 24
cells. Measured: AP50 0.97 with softmax, and within 0.02 of it with sparsemax, entmax15 and entmax-learned.
"""

from dataclasses import replace

from detr_fabric.config import AttnConfig, Mapping
from detr_fabric.study.settings import Study
from experiments import quickstart

MAPPINGS: tuple[Mapping, ...] = (
    "sparsemax",
    "entmax15",
    "entmax-learned",
    "topk",
    "relu",
    "sigmoid",
    "softmax1",
)

study = Study(
    configs={"softmax": quickstart.config}
    | {kind: replace(quickstart.config, attn=AttnConfig(kind=kind, softmax_first=0.5)) for kind in MAPPINGS},
    seeds=(42, 43, 44),
)
