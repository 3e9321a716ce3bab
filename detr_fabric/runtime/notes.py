"""Settings that do nothing, or not what one would expect, a sentence each."""

from __future__ import annotations

from detr_fabric.config import AttnConfig, Config, OptimConfig


def notes(cfg: Config, steps_per_epoch: int) -> list[str]:
    """What there is to say about the settings of a resolved config before training starts."""
    optim, attn, train, data = cfg.optim, cfg.attn, cfg.train, cfg.data
    kinds = {attn.kind, attn.encoder_self, attn.decoder_self, attn.decoder_cross}
    schedule = f"--optim.schedule {optim.schedule}"
    found = {
        f"--optim.warmup {optim.warmup} has no effect under {schedule}: use --optim.warmup-steps": (
            optim.schedule != "one-cycle" and optim.warmup != OptimConfig().warmup
        ),
        "--optim.warmup-steps has no effect under --optim.schedule one-cycle: use --optim.warmup": (
            optim.schedule == "one-cycle" and optim.warmup_steps > 0
        ),
        f"--optim.lr-drop {optim.lr_drop} has no effect under {schedule}": (
            optim.schedule != "step" and optim.lr_drop != OptimConfig().lr_drop
        ),
        f"--optim.lr-drop {optim.lr_drop} comes after the last epoch, {train.epochs}: the learning rate never drops": (
            optim.schedule == "step" and train.max_steps is None and optim.lr_drop >= train.epochs
        ),
        f"--optim.lr-backbone {optim.lr_backbone:g} is above --optim.lr {optim.lr:g}": optim.lr_backbone > optim.lr,
        f"--attn.alpha {attn.alpha} has no effect: only entmax and entmax-learned have an alpha": (
            attn.alpha != AttnConfig().alpha and not kinds & {"entmax", "entmax-learned"}
        ),
        f"--data.augment {data.augment} takes the place of the original's flip and crop": data.augment != "original",
        f"--attn.topk {attn.topk} has no effect without --attn.kind topk": (
            attn.topk != AttnConfig().topk and "topk" not in kinds
        ),
        f"--train.max-steps {train.max_steps} is more than the {train.epochs} epochs, and rules": (
            train.max_steps is not None and train.max_steps > train.epochs * steps_per_epoch
        ),
    }
    return [f"note    {sentence}" for sentence, holds in found.items() if holds]
