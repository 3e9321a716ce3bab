"""DETR with ResNet-18 on COCO, 300 epochs, for cards of 12 GB.

    torchrun --nproc_per_node 2 -m detr_fabric.train --preset r18_coco --data.root coco

No AP is published for plain DETR with this backbone. Not run here yet (write AP and the W&B run here).
"""

from dataclasses import replace

from experiments import r50_coco

config = replace(r50_coco.config, model=replace(r50_coco.config.model, backbone="resnet18"))

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
