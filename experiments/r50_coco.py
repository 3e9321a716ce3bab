"""DETR with ResNet-50 on COCO, 300 epochs: the original's main recipe.

    torchrun --nproc_per_node 2 -m detr_fabric.train --preset r50_coco --data.root coco

The recipe is 16 images a step with a learning rate of 1e-4: 8 on each of 2 GPUs, which keeps them busy.
On 8 GPUs add --train.batch-size 2, on one --train.accumulate 2.

Expected: AP 40.6 (published for 300 epochs; 8 V100, batch 16 in all, 28 minutes an epoch). Not run here yet.
"""

from detr_fabric.config import Config, TrainConfig

config = Config(train=TrainConfig(batch_size=8))  # all else are the defaults, which are the original recipe

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
