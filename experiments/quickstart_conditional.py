"""`quickstart` with conditional cross-attention and focal loss, to see on built-in scenes what they change.

    python -m detr_fabric.train --preset quickstart_conditional

Measured, 3 seeds: AP50 0.743, 0.973, 0.989 after 250, 500 and 1,000 steps and AP 0.898 in the end, where quickstart has
0.152, 0.662, 0.965 and 0.775.
"""

from dataclasses import replace

from detr_fabric.config import LossConfig
from experiments import quickstart

config = replace(
    quickstart.config,
    model=replace(quickstart.config.model, cross_attention="conditional"),
    loss=LossConfig(kind="focal", cost_class=2.0, ce_coef=2.0),
)

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
