"""The convolutional backbone: a torchvision ResNet that ends with a chosen stage, and DC5.

Shapes: B batch, H×W image, K channels and h×w of the features (H/32 for layer4, H/16 with dilation).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr_fabric.model.folded_norm import FoldedNorm, fold_norms, set_scales_and_shifts

STAGES = ("layer1", "layer2", "layer3", "layer4")


class Backbone(nn.Module):
    """Images → features of the last stage, and the padding mask at their resolution."""

    def __init__(
        self,
        name: str = "resnet50",
        last_stage: str = "layer4",
        dilation: bool = False,
        frozen_norm: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        norm_layer = FoldedNorm if frozen_norm else nn.BatchNorm2d
        resnet = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer)
        if dilation:
            dilate(resnet.layer4)
        kept = ("conv1", "bn1", "relu", "maxpool", *STAGES[: STAGES.index(last_stage) + 1])
        self.body = nn.Sequential(OrderedDict((part, getattr(resnet, part)) for part in kept))
        last_block = getattr(resnet, last_stage)[-1]
        self.num_channels: int = getattr(last_block, "conv3", last_block.conv2).out_channels
        self.folded = fold_norms(self.body) if frozen_norm else ()
        # Recomputing a stage would update trained batch statistics twice.
        self.recomputed = STAGES if gradient_checkpointing and frozen_norm else ()

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W), mask (B, H, W) True on padding → features (B, K, h, w), mask (B, h, w)."""
        set_scales_and_shifts(self.folded, images.dtype)
        x = images
        for name, part in self.body.named_children():
            recompute = name in self.recomputed and self.training and next(part.parameters()).requires_grad
            x = checkpoint(part, x, use_reentrant=False) if recompute else part(x)
        return x, shrink_mask(mask, x.shape[-2], x.shape[-1])

    def train(self, mode: bool = True) -> Backbone:
        """Like nn.Module.train, but frozen parts stay in eval mode, because their batch statistics must not move."""
        super().train(mode)
        for part in self.body.children():
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self


def shrink_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W) bool → (B, height, width): each feature takes the pixel that F.interpolate's mode "nearest" takes.

    Computed in integers, because ONNX Runtime rounds some of F.interpolate's fractions down to the pixel before.
    """
    sides = zip((height, width), mask.shape[-2:], strict=True)
    rows, columns = (torch.arange(new, device=mask.device) * old // new for new, old in sides)
    return mask[:, rows[:, None], columns]


def dilate(stage: nn.Sequential) -> None:
    """Replaces a ResNet stage's stride 2 by dilation, in place (DC5; torchvision refuses this for basic blocks).

    Convolutions after the removed stride look at every second pixel, so output[..., ::2, ::2] is the strided output.
    """
    strided = False
    for conv in (m for m in stage.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (3, 3) and strided:
            conv.dilation = conv.padding = (2, 2)
        strided = strided or (conv.stride == (2, 2) and conv.kernel_size == (3, 3))
        conv.stride = (1, 1)
