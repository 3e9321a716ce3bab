"""DETR with ResNet-50 on COCO, 300 epochs: the original's main recipe.

    torchrun --nproc_per_node 8 -m detr_fabric.train --preset r50_coco --data.root coco

Expected: AP 40.6 (published for 300 epochs; 8 V100, batch 16 in all, 28 minutes an epoch). Not run here yet.
"""

from detr_fabric.config import Config

config = Config()  # the defaults are the original recipe

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
