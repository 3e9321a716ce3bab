"""What a model takes as an image: files, URLs, Pillow images and pixels; and folders and globs, which name files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fabric.data.images import decode_image, read_image, to_tensor
from detr_fabric.errors import UserError
from detr_fabric.predict.paths import files_of, is_many

Source = str | os.PathLike[str] | Image.Image | Tensor | np.ndarray
"""An image: a file or the address of one (http, https), which is turned by its EXIF orientation tag as viewers do; or
pixels, taken as they are: a Pillow image, a tensor (3, H, W) or an array (H, W, 3), uint8 RGB."""

MAX_BYTES = 2**26  # of a download: 64 MB
SECONDS = 30.0  # for a whole download, and at most SILENT of them without a byte
SILENT = 10.0


class Item(NamedTuple):
    """One image and what it is called."""

    source: Source
    name: str


def is_url(source: object) -> TypeGuard[str]:
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def is_path(source: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(source, (str, os.PathLike)) and not is_url(source)


def items_of(source: Source) -> Iterator[Item]:
    """The image that is meant; for a folder or a glob, each of its images. Raises UserError for what names nothing."""
    if is_url(source):
        yield Item(source, unquote(urlsplit(source).path.rpartition("/")[2]) or source)
    elif is_path(source):
        yield from (Item(path, name) for path, name in files_of(os.fspath(source)))
    else:
        yield Item(source, Path(getattr(source, "filename", "") or "").name or "the image")


def named(sources: Iterable[Source], unreadable: Callable[[UserError], object] | None) -> Iterator[Item]:
    """All images that are meant; unreadable: called with what names nothing. None: that is raised, a UserError."""
    for source in sources:
        try:
            yield from items_of(source)
        except UserError as error:
            if unreadable is None:
                raise
            unreadable(error)


def one_image(image: Any) -> Source:
    """The same, if it names one image. Raises UserError for a folder, a glob, and what names nothing."""
    if is_path(image) and is_many(path := os.fspath(image)):
        raise UserError(
            f"{path} may be many images: put it into a list, [{path!r}], to get a list, or give it to .stream(), which "
            "yields what is found in one image after the other"
        )
    (item,) = items_of(image)
    return item.source


def read_source(image: Any) -> Tensor:
    """(3, H, W) uint8 RGB of a Source. Raises UserError for anything else."""
    if is_url(image):
        return decode_image(image, download(image), turn=True)
    if is_path(image):
        return read_image(Path(image), turn=True)
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise UserError(
                f"a tensor of {image.dtype} {tuple(image.shape)} is no image: give uint8 RGB of shape "
                "(3, height, width), or a list of such"
            )
        return image.cpu()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise UserError(
                f"an array of {image.dtype} {image.shape} is no image: give uint8 RGB of shape (height, width, 3), or "
                "a list of such"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if isinstance(image, Image.Image):
        try:
            return to_tensor(image)
        except Exception as error:  # on damaged files Pillow raises nearly anything
            raise UserError(f"a Pillow image can't be read ({error}): open it again, or give its file") from error
    raise UserError(f"{type(image).__name__} is no image: give a file, a Pillow image, or uint8 pixels")


def download(url: str) -> bytes:
    """What an address holds. Raises UserError where it can't be had, has more than MAX_BYTES or takes longer than
    SECONDS."""
    ends, content = time.monotonic() + SECONDS, bytearray()
    try:
        request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "detr_fabric"})
        with closing(urlopen(request, timeout=SILENT)) as answer:
            while part := answer.read1(2**16):
                content += part
                if len(content) > MAX_BYTES:
                    raise UserError(f"{url}: has more than {MAX_BYTES / 2**20:g} MB; download it and give the file")
                if time.monotonic() > ends:
                    raise UserError(f"{url}: not loaded after {SECONDS:g} s; download it and give the file")
            return bytes(content)
    except UserError:
        raise
    except (OSError, HTTPException, ValueError) as error:  # of the network, of what answers, of the address itself
        raise UserError(f"{url}: can't be loaded ({error}); check the address, or give a file") from error


@contextmanager
def reading_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that read and draw, because Pillow and torch let others run meanwhile. An error drops what waits."""
    pool = ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
