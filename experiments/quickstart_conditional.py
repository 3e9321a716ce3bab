"""`quickstart` with conditional cross-attention and focal loss, to see on built-in scenes what they change.

    python -m detr_fabric.train --preset quickstart_conditional

Measured, seed 42: AP50 0.680, 0.966, 0.989 after 250, 500 and 1,000 steps and AP 0.894 in the end, where quickstart has
0.714 after 500, 0.968 and 0.789 (three seeds).
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
