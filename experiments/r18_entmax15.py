"""ResNet-18 DETR with 1.5-entmax in every attention block, on COCO.

    torchrun --nproc_per_node 2 -m detr_fabric.train --preset r18_entmax15 --data.root coco

Compare with r18_coco. Not run here yet (write AP and the W&B run here).
"""

from dataclasses import replace

from detr_fabric.config import AttnConfig
from experiments import r18_coco

config = replace(r18_coco.config, attn=AttnConfig(kind="entmax15"))

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
