"""How far do 250, 500 and 1,000 steps go? The original and conditional cross-attention, on quickstart's scenes.

    python -m detr_fabric.study experiments/budget_study.py

Conditional runs have focal loss too. Those with EMA evaluate a moving average of the weights. Cost: 5 to 17 minutes a
cell on one CPU core, 18 cells.
"""

from dataclasses import replace

from detr_fabric.config import AttnConfig
from detr_fabric.study.settings import Study
from experiments import quickstart, quickstart_conditional

conditional = quickstart_conditional.config
models = {
    "original": quickstart.config,
    "conditional": conditional,
    "conditional-sparsemax": replace(conditional, attn=AttnConfig(kind="sparsemax")),
}

study = Study(
    configs={
        name + ending: replace(config, optim=replace(config.optim, ema=ema), eval=replace(config.eval, every=1))
        for name, config in models.items()
        for ending, ema in (("", None), ("-ema", 0.9997))
    },
    seeds=(42, 43, 44),
    steps=(250, 500, 1000),
)
