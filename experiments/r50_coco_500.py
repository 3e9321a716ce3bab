"""DETR with ResNet-50 on COCO, 500 epochs: the recipe of the paper's tables.

    torchrun --nproc_per_node 2 -m detr_fabric.train --preset r50_coco_500 --data.root coco

Expected: AP 42.0, AP50 62.4 (published; 8 V100, batch 16 in all, about 10 days). Not run here yet.
"""

from dataclasses import replace

from experiments import r50_coco

config = replace(
    r50_coco.config,
    optim=replace(r50_coco.config.optim, lr_drop=400),
    train=replace(r50_coco.config.train, epochs=500),
)

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
