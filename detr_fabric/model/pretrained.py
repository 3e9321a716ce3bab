"""ImageNet weights for the backbone: from torchvision by name, or from a file."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from detr_fabric.errors import UserError


def load_backbone_weights(body: nn.Module, name: str, weights: str) -> None:
    """Loads ImageNet weights into the body of a backbone; the classifier in them is ignored.

    name: of the ResNet. weights: a file, or the name of torchvision weights (downloaded, and checked by hash).
    Raises UserError if there are no such weights, the download fails, or they don't fit this backbone.
    """
    source, state = (weights, read_state_dict(weights)) if Path(weights).is_file() else download(name, weights)
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


def download(name: str, weights: str) -> tuple[str, dict[str, Tensor]]:
    """URL and state dict of torchvision weights, from torch.hub's cache if they are there."""
    known = torchvision.models.get_model_weights(name)
    if weights not in known.__members__:
        raise UserError(
            f"model.backbone_weights is {weights!r}, which is neither a file nor weights of {name}: "
            f"give a file, none, or one of {', '.join(known.__members__)}"
        )
    url: str = known[weights].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    try:
        # The hash of a cached file is not checked again, so the file must not be able to run code: weights_only.
        return url, known[weights].get_state_dict(check_hash=True, weights_only=True, progress=False)
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


def read_state_dict(path: str) -> dict[str, Tensor]:
    """The state dict in a file, also if it lies under "state_dict" or "model" there."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on damaged files
        raise UserError(f"{path}: not a file of weights ({type(error).__name__}); save a state dict there") from error
    state = content.get("state_dict", content.get("model", content)) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict; save model.state_dict() there")
    return state
