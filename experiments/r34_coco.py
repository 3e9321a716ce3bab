"""DETR with ResNet-34 on COCO, 300 epochs.

    torchrun --nproc_per_node 4 -m detr_fabric.train --preset r34_coco --data.root coco

No AP is published for plain DETR with this backbone. Not run here yet (write AP and the W&B run here).
"""

from dataclasses import replace

from experiments import r50_coco

config = replace(
    r50_coco.config,
    model=replace(r50_coco.config.model, backbone="resnet34"),
    train=replace(r50_coco.config.train, batch_size=4),
)

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
