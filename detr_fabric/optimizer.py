"""AdamW, its parameter groups and its schedule."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from detr_fabric.config import OptimConfig
from detr_fabric.model.mappings import is_learned_by_a_mapping


def build_optimizer(model: nn.Module, optim: OptimConfig, fused: bool = True) -> AdamW:
    """AdamW with groups "backbone", "alpha" (what mappings learn) and "transformer" (the rest of what is trained).

    fused: one kernel for all parameters; impossible with fp16's loss scaling, where Fabric could not clip gradients.
    """
    groups: dict[str, list[nn.Parameter]] = {"transformer": [], "backbone": [], "alpha": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            learned = is_learned_by_a_mapping(name)
            groups["alpha" if learned else "backbone" if "backbone" in name else "transformer"].append(p)
    lr = {"transformer": optim.lr, "backbone": optim.lr_backbone, "alpha": optim.alpha_lr_factor * optim.lr}
    return AdamW(
        [
            {
                "name": name,
                "params": params,
                "lr": lr[name],
                "weight_decay": optim.alpha_weight_decay if name == "alpha" else optim.weight_decay,
            }
            for name, params in groups.items()
            if params
        ],
        fused=fused,
    )


def build_scheduler(optimizer: AdamW, optim: OptimConfig, steps_per_epoch: int, total_steps: int) -> LambdaLR:
    """Factors of the learning rate by optimizer step: drops to a tenth (StepLR), one linear rise and fall, or 1."""

    def step_drop(step: int) -> float:
        return rise(step) * 0.1 ** (step // (steps_per_epoch * optim.lr_drop))

    def one_cycle(step: int) -> float:
        peak = max(1, round(optim.warmup * total_steps))
        return min((step + 1) / peak, max(0.0, (total_steps - step) / max(1, total_steps - peak)))

    def rise(step: int) -> float:
        return min(1.0, (step + 1) / (optim.warmup_steps + 1))

    schedule: Callable[[int], float] = {"step": step_drop, "one-cycle": one_cycle, "constant": rise}[optim.schedule]
    return LambdaLR(
        optimizer,
        [
            rise if group["name"] == "alpha" and not optim.alpha_lr_drop else schedule
            for group in optimizer.param_groups
        ],
    )
