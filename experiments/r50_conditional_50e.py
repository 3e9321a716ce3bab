"""Conditional DETR with ResNet-50 on COCO, 50 epochs (Meng et al. 2021): a sixth of the epochs of r50_coco.

    torchrun --nproc_per_node 2 -m detr_fabric.train --preset r50_conditional_50e --data.root coco

Expected: AP 41.0, of small, medium and large objects 20.6, 44.3, 59.3 (published with the authors' code,
github.com/Atten4Vis/ConditionalDETR: 44 M parameters, 30 hours on 8 V100, batch 16 in all). DETR has 34.8 after 50
epochs, as published there. Not run here yet.
"""

from dataclasses import replace

from detr_fabric.config import LossConfig
from experiments import r50_coco

config = replace(
    r50_coco.config,
    model=replace(r50_coco.config.model, cross_attention="conditional", num_queries=300),
    loss=LossConfig(kind="focal", cost_class=2.0, ce_coef=2.0),
    optim=replace(r50_coco.config.optim, lr_drop=40),
    train=replace(r50_coco.config.train, epochs=50),
)

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
