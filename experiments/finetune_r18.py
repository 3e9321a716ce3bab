"""A DETR with ResNet-18 of your own, fine-tuned on other classes.

    python -m detr_fabric.train --preset finetune_r18 --model.checkpoint FILE --data.train-images … \
        --data.train-annotations … --data.val-images … --data.val-annotations …

FILE is best.ckpt of r18_coco or of another run with its model: no weights of this size are published. Cost: 40 epochs
on your pictures. AP: not run yet (write yours and the W&B run here).
"""

from dataclasses import replace

from experiments import finetune_r50

config = replace(
    finetune_r50.config,
    model=replace(finetune_r50.config.model, backbone="resnet18", checkpoint="runs/r18_coco/best.ckpt"),
)

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
