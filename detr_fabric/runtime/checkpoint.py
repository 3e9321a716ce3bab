"""Checkpoints: plain tensors, numbers, strings and lists in one file that is replaced whole or not at all."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detr_fabric.errors import UserError
from detr_fabric.runtime.contents import weights
from detr_fabric.runtime.hugging_face import read_folder

VERSION = 1


def save_checkpoint(path: Path, content: dict[str, Any], keep_previous: bool = True, names: Sequence[str] = ()) -> None:
    """Writes beside the target, then renames: a kill or a full disk leaves the previous file as it was.

    With keep_previous, what `path` held becomes previous.ckpt beside it. From the second call on, two different
    complete checkpoints exist at every moment: the old previous.ckpt goes only after the new file has its name. The
    file also gets these names beside it, before its own: a checkpoint that knows of them never exists without them.
    Raises OSError or RuntimeError when the file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = path.with_name(f"{path.name}.tmp"), path.with_name("previous.ckpt.tmp")
    try:
        with open(new, "wb") as file:
            torch.save({**content, "version": VERSION}, file)
            file.flush()
            os.fsync(file.fileno())
        for name in names:
            copy_checkpoint(new, path.with_name(name))
        if keep_previous and path.exists():
            _link(path, old)
        os.replace(new, path)
        if keep_previous and old.exists():
            os.replace(old, path.with_name("previous.ckpt"))
        _sync_folder(path.parent)
    finally:
        for temporary in (new, old) if keep_previous else (new,):
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def copy_checkpoint(source: Path, target: Path) -> None:
    """A second name for a checkpoint, which costs no space; on file systems without hard links a copy."""
    temporary = target.with_name(f"{target.name}.tmp")
    _link(source, temporary)
    os.replace(temporary, target)
    _sync_folder(target.parent)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # FAT and some network file systems know no hard links
        shutil.copyfile(source, target)
        with open(target, "rb+") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Renames reach the disk too, so that a power cut finds them."""
    with suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this package, on the CPU. Raises UserError for any other, damaged or newer file."""
    return our_checkpoint(read_torch_file(path), path)


def our_checkpoint(content: Any, path: Path) -> dict[str, Any]:
    """What was read, if it is a checkpoint of this package and of this version. Raises UserError if not."""
    if not isinstance(content, dict) or not {"model", "config", "categories", "version"} <= content.keys():
        raise UserError(f"{path}: not a checkpoint of detr_fabric; give a .ckpt file from a run's folder")
    version = content["version"]
    if type(version) is not int or version != VERSION:
        raise UserError(f"{path}: written by version {version!r:.80} of the format, this package reads {VERSION}")
    return content


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote, if every byte is as written and none of it is code; or a folder of transformers."""
    if os.path.isdir(path):
        return {**read_folder(path), "version": VERSION}
    if not os.path.isfile(path):  # which is False for names that the system does not take
        raise UserError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):  # neither torch nor safetensors notices a flipped bit
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"{path}: damaged ({damaged} fails its checksum); use an earlier checkpoint")
        # the original's training checkpoints carry their command line as a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (pickle.UnpicklingError, KeyError) as error:  # words that advise to run what is in the file, or say nothing
        raise UserError(
            f"{path}: can't be read as a checkpoint (it is none, is damaged, or holds code, which is never run)"
        ) from error
    except Exception as error:  # torch, zipfile and pickle raise many kinds on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: can't be read as a checkpoint ({reason})") from error


def read_weights(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file at a path or URL, an original checkpoint or one of ours: all that it holds, and its weights.

    Raises UserError when it can't be had or holds no weights.
    """
    path = download(source) if source.startswith(("http://", "https://")) else Path(source)
    if not os.path.exists(path):
        raise UserError(f"--model.checkpoint {source}: no such file; give weights to start from")
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"--model.checkpoint {source}: holds no weights under the key 'model'")
    return content, weights(content.get("model", content), f"--model.checkpoint {source}")


def download(url: str) -> Path:
    """The file at a URL, kept in torch.hub's folder; checked by the hash in its name (detr-r50-e632da11.pth)."""
    name = url.rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        sha256 = re.search(r"-([0-9a-f]{8,})\.", name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256[1] if sha256 else None, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise UserError(
                f"--model.checkpoint {url}: download failed ({error}); copy the file to {path} or give its path"
            ) from error
    return path


def load_model_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Strict loading whose error is one sentence."""
    own = model.state_dict()
    weights(state, source)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or unexpected or wrong:
        raise UserError(
            f"{source}: does not fit this model: {len(missing)} tensors missing, {len(unexpected)} unknown, "
            f"{len(wrong)} of another shape (first: {(wrong + missing + unexpected)[0]}); "
            "check --model.backbone, --data.label-space and the data's classes"
        )
    model.load_state_dict(state)
