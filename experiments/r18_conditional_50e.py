"""Conditional DETR with ResNet-18 on COCO, 50 epochs, for cards of 12 GB: a sixth of the epochs of r18_coco.

    torchrun --nproc_per_node 4 -m detr_fabric.train --preset r18_conditional_50e --data.root coco

No AP is published for Conditional DETR with this backbone. A yardstick: DAB-DETR with ResNet-18 has 36.2 after 50
epochs (arXiv 2211.08071). Not run here yet (write AP and the W&B run here).
"""

from dataclasses import replace

from experiments import r50_conditional_50e

config = replace(
    r50_conditional_50e.config,
    model=replace(r50_conditional_50e.config.model, backbone="resnet18"),
    train=replace(r50_conditional_50e.config.train, batch_size=4),
)

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
