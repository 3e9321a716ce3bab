"""The convolutional backbone: a torchvision ResNet cut after one stage, its weights, and DC5.

Shapes: B batch, H×W image, h×w features (H/32 for layer4, H/16 with dilation).
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from detr_fabric.errors import UserError

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
        if frozen_norm:
            fold_norms(resnet)
        if dilation:
            dilate(resnet.layer4)
        kept = ("conv1", "bn1", "relu", "maxpool", *STAGES[: STAGES.index(last_stage) + 1])
        self.body = nn.Sequential(OrderedDict((part, getattr(resnet, part)) for part in kept))
        last_block = getattr(resnet, last_stage)[-1]
        self.num_channels: int = getattr(last_block, "conv3", last_block.conv2).out_channels
        # Recomputing a stage would update trainable batch statistics twice.
        self.recomputed = STAGES if gradient_checkpointing and frozen_norm else ()

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W), mask (B, H, W) True on padding → features (B, C, h, w), mask (B, h, w)."""
        x = images
        for name, part in self.body.named_children():
            recompute = name in self.recomputed and self.training and next(part.parameters()).requires_grad
            x = checkpoint(part, x, use_reentrant=False) if recompute else part(x)
        return x, shrink_mask(mask, x.shape[-2], x.shape[-1])

    def train(self, mode: bool = True) -> Backbone:
        """As nn.Module.train, but frozen parts stay in eval mode: their batch statistics must not move."""
        super().train(mode)
        for part in self.body.children():
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self


def shrink_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W) bool → (B, height, width), every place from its nearest pixel as F.interpolate takes it.

    In whole numbers: of F.interpolate's fractions ONNX Runtime rounds some to the pixel before.
    """
    sides = zip((height, width), mask.shape[-2:], strict=True)
    rows, columns = (torch.arange(new, device=mask.device) * old // new for new, old in sides)
    return mask[:, rows[:, None], columns]


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm whose work the convolution before it does: it keeps the statistics, under their names."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(C,) and (C,): what the norm multiplies each channel by, and then adds."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class NormedConv(nn.Conv2d):
    """A convolution and the frozen batch norm behind it as one convolution: two passes over its output are saved."""

    norm: tuple[FoldedNorm]  # in a tuple, so that its buffers are not listed a second time

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.norm[0].scale_and_shift()
        return self._conv_forward(x, self.weight * scale[:, None, None, None], shift)


def fold_norms(resnet: nn.Module) -> None:
    """Has every convolution of a ResNet do the work of the FoldedNorm that is registered after it, in place."""
    convs = [m for m in resnet.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in resnet.modules() if isinstance(m, FoldedNorm)]
    for conv, norm in zip(convs, norms, strict=True):
        assert conv.bias is None and conv.out_channels == norm.weight.numel()
        conv.__class__ = NormedConv  # torchvision's blocks make their convolutions themselves
        assert isinstance(conv, NormedConv)
        conv.norm = (norm,)


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


def load_backbone_weights(body: nn.Module, name: str, weights: str) -> None:
    """Loads ImageNet weights into the body: torchvision weights by name (downloaded, checked by hash), or from a file.

    Raises UserError when the name is unknown, the download fails, or the file does not hold this backbone.
    """
    if Path(weights).is_file():
        source, state = weights, _read_state_dict(weights)
    else:
        known = torchvision.models.get_model_weights(name)
        if weights not in known.__members__:
            raise UserError(
                f"model.backbone_weights is {weights!r}, neither a file nor weights of {name}: "
                f"give a file, none, or one of {', '.join(known.__members__)}"
            )
        url = known[weights].url
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
        try:
            # an earlier download is read without a look at its hash, so it must not be able to run code either
            source, state = url, known[weights].get_state_dict(check_hash=True, weights_only=True, progress=False)
        except Exception as error:  # urllib, torch.hub and its unpickler raise many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if file.is_file():
                raise UserError(
                    f"{file} can't be read as the weights of {url} ({reason}): delete it, or give "
                    "--model.backbone-weights FILE"
                ) from error
            raise UserError(
                f"{url} could not be downloaded ({reason}) and there is no {file}: copy it there, "
                f"or give --model.backbone-weights FILE, or none to train from scratch"
            ) from error
    own = body.state_dict()
    found = {key: value for key, value in state.items() if key in own}
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    wrong = [key for key, value in found.items() if value.shape != own[key].shape]
    if missing or wrong:
        raise UserError(
            f"{source}: not the weights of a {name}: {len(missing)} tensors missing, {len(wrong)} of another shape "
            f"(first: {(missing + wrong)[0]}); choose the file that fits --model.backbone"
        )
    body.load_state_dict(found, strict=False)


def _read_state_dict(path: str) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on damaged files
        raise UserError(f"{path}: not a file of weights ({type(error).__name__}); save a state dict there") from error
    state = content.get("state_dict", content.get("model", content)) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict; save model.state_dict() there")
    return state
