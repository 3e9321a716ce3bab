"""Do sparse mappings also learn where there are more keys, and with the original's norms and dropout?

    python -m detr_fabric.study experiments/keys_study.py

A query of quickstart chooses among 64 keys, one of COCO among about 1,000. The original's decoder hardly learns in
1,000 steps of 8 images, so 1,024 keys have the conditional one. Cost: 8 to 18 minutes a cell on one CPU core.
"""

from dataclasses import replace
from typing import Any

from detr_fabric.config import AttnConfig, Config, Mapping
from detr_fabric.study.settings import Study
from experiments import quickstart, quickstart_conditional

KINDS: tuple[Mapping, ...] = ("softmax", "sparsemax", "entmax15")


def changed(config: Config, model: dict[str, Any], batch_size: int = 32, steps: int = 1000, **sections: Any) -> Config:
    """A preset of 1,000 steps and batches of 32 with other ones, and evaluated at the end."""
    epochs = config.train.epochs * batch_size * steps // (32 * 1000)
    train = replace(config.train, batch_size=batch_size, epochs=epochs)
    return replace(
        config, train=train, eval=replace(config.eval, every=epochs), model=replace(config.model, **model), **sections
    )


base, conditional = quickstart.config, quickstart_conditional.config
scenes = replace(base.data, shapes_size=128)
settings = {
    "256-keys": changed(base, {}, 16, data=scenes),
    "1024-keys-conditional": changed(conditional, {"last_stage": "layer1", "enc_layers": 1}, 8, data=scenes),
    "post-norm": changed(base, {"pre_norm": False, "dropout": 0.1}, steps=2000, optim=replace(base.optim, lr=5e-4)),
}
late = AttnConfig(kind="sparsemax", softmax_first=0.75)

study = Study(
    configs={
        f"{kind}-{name}": replace(config, attn=AttnConfig(kind=kind))
        for name, config in settings.items()
        for kind in KINDS
    }
    | {f"sparsemax-{name}-late": replace(settings[name], attn=late) for name in ("256-keys", "post-norm")},
    seeds=(42, 43),
)
