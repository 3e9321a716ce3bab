"""Conditional DETR with ResNet-18 and sparsemax in every attention block, on COCO, 50 epochs.

    torchrun --nproc_per_node 4 -m detr_fabric.train --preset r18_conditional_sparse_50e --data.root coco

The first 25 epochs train with softmax (attn.softmax_first). Compare with r18_conditional_50e. Not run here yet (write
AP and the W&B run here).
"""

from dataclasses import replace

from detr_fabric.config import AttnConfig
from experiments import r18_conditional_50e

config = replace(r18_conditional_50e.config, attn=AttnConfig(kind="sparsemax"))

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
