"""Do sparse mappings also learn where there are more keys, and with the original's norms and dropout?

    python -m detr_fabric.study experiments/keys_study.py

A query of quickstart chooses among 64 keys, one of COCO among about 1,000. Cost on one CPU core: about 15 minutes a
cell of 256 keys, 10 of 1,024 keys (a smaller model and batch) and 6 of post-norm.
"""

from dataclasses import replace

from detr_fabric.config import AttnConfig, Config, Mapping
from detr_fabric.study.settings import Study
from experiments import quickstart

KINDS: tuple[Mapping, ...] = ("softmax", "sparsemax", "entmax15")
base = quickstart.config
scenes = replace(base.data, shapes_size=128)


def steps_of(batch: int) -> Config:
    """Quickstart's 1,000 steps with smaller batches, evaluated at the end."""
    train = replace(base.train, batch_size=batch, epochs=base.train.epochs * batch // base.train.batch_size)
    return replace(base, train=train, eval=replace(base.eval, every=train.epochs))


settings = {
    "256-keys": replace(steps_of(16), data=scenes),
    "1024-keys": replace(steps_of(8), data=scenes, model=replace(base.model, last_stage="layer1", enc_layers=1)),
    "post-norm": replace(
        base, model=replace(base.model, pre_norm=False, dropout=0.1), optim=replace(base.optim, lr=5e-4)
    ),
}

study = Study(
    configs={
        f"{kind}-{name}": replace(config, attn=AttnConfig(kind=kind))
        for name, config in settings.items()
        for kind in KINDS
    },
    seeds=(42, 43),
)
