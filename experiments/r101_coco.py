"""DETR with ResNet-101 on COCO, 500 epochs.

    torchrun --nproc_per_node 2 -m detr_fabric.train --preset r101_coco --data.root coco

Expected: AP 43.5, AP50 63.8 (published; 152 GFLOPs). Not run here yet.
"""

from dataclasses import replace

from experiments import r50_coco_500

config = replace(r50_coco_500.config, model=replace(r50_coco_500.config.model, backbone="resnet101"))

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
