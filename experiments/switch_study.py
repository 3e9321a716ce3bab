"""Does it matter when softmax hands over? sparsemax on quickstart after 0 to 75 % of the steps with softmax.

    python -m detr_fabric.study experiments/switch_study.py

Cost: 5 to 8 minutes a cell on one CPU core, 15 cells. Measured: AP50 0.26, 0.67, 0.91, 0.95, 0.96.
"""

from dataclasses import replace

from detr_fabric.config import AttnConfig
from detr_fabric.study.settings import Study
from experiments import quickstart

study = Study(
    configs={
        str(first): replace(quickstart.config, attn=AttnConfig(kind="sparsemax", softmax_first=first))
        for first in (0.0, 0.1, 0.25, 0.5, 0.75)
    },
    seeds=(42, 43, 44),
    numbers="part of the steps that train with softmax first",
)
