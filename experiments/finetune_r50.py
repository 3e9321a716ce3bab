"""The published DETR with ResNet-50, fine-tuned on your own classes.

    python -m detr_fabric.train --preset finetune_r50 --data.train-images … --data.train-annotations … \
        --data.val-images … --data.val-annotations …

Classes that COCO has too (by name) keep what the model knows of them. Cost: 40 epochs on your pictures, where training
from scratch takes 300. AP: not run yet (write yours and the W&B run here).
"""

from dataclasses import replace

from detr_fabric.config import OptimConfig
from experiments import r50_coco

config = replace(
    r50_coco.config,
    model=replace(r50_coco.config.model, checkpoint="https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth"),
    optim=OptimConfig(lr=5e-5, lr_backbone=5e-6, lr_drop=30),
    train=replace(r50_coco.config.train, epochs=40, batch_size=4),
)

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
