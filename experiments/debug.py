"""A few steps of a tiny DETR on built-in scenes: shows within seconds that everything is wired up.

    python -m detr_fabric.train --preset debug

Expected: it ends without an error after seconds on a CPU; its scores mean nothing.
"""

from detr_fabric.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig, WandbConfig

config = Config(
    data=DataConfig(shapes_train=64, shapes_val=16, workers=0),
    model=ModelConfig(
        backbone="resnet18",
        last_stage="layer1",
        hidden_dim=32,
        heads=4,
        enc_layers=1,
        dec_layers=2,
        dim_feedforward=64,
        num_queries=8,
    ),
    train=TrainConfig(epochs=2, batch_size=8, log_every=2),
    eval=EvalConfig(batch_size=8),
    wandb=WandbConfig(mode="disabled", panel_images=4),
)

if __name__ == "__main__":
    from detr_fabric.train import main

    main(config)
