"""Image files → (3, H, W) uint8 RGB, with every broken file turned into one sentence.

Pillow decodes, as in the original, but for sound JPEG files, of which simplejpeg makes the same pixels sooner.
Whether pixels are turned by EXIF orientation is the data set's matter, see formats/orientation.py.
"""

from __future__ import annotations

import io
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from detr_fabric.data.formats.files import open_image
from detr_fabric.data.formats.orientation import orientation
from detr_fabric.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 2**26 + 2**24  # 84 million pixels, 250 MB as RGB: just under the size at which Pillow starts to warn
FLIPPED = (3, 4, 7, 8), (2, 3, 6, 7)  # EXIF orientations whose rows and columns count backwards (5 to 8: transposed)
RETRY_SECONDS = (0.1, 0.5, 2.0)  # network file systems fail now and then


def read_image(path: Path, turn: bool = False, size: tuple[int, int] = (0, 0)) -> Tensor:
    """Reads one image file. Returns (3, H, W) uint8 RGB; alpha is dropped and of animations the first frame is taken.

    turn: turn it by its EXIF orientation tag, as viewers do. size: (height, width) that it should have; if only the
    turned view can have it, the image is turned too.

    Raises UserError naming the file when it cannot be read, is no image of FORMATS, is damaged, or has more than
    MAX_PIXELS pixels (checked in the header, before decoding).
    """
    return decode_image(path, _read_bytes(path), turn, size)


def decode_image(path: str | Path, data: bytes, turn: bool = False, size: tuple[int, int] = (0, 0)) -> Tensor:
    """The image in the content of a file, as by read_image. path: what it is called."""
    image = _decode(path, data)
    if turn or size[0] != size[1] and size == (image.shape[2], image.shape[1]):
        return _turned(image, data)
    return image


def _decode(path: str | Path, data: bytes) -> Tensor:
    with suppress(ValueError):  # then Pillow, which forgives more, has the last word
        return _sound_jpeg(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except Exception as error:  # on damaged files Pillow's plugins raise nearly anything
        raise UserError(f"{path} is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image: replace the file") from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path)
    try:
        return to_tensor(image)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not supported ({reason}): replace the file") from error


def _sound_jpeg(data: bytes) -> Tensor:
    """(3, H, W) uint8 RGB. Raises ValueError for all but a JPEG in colour or grey without any fault, and no bomb."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in ("YCbCr", "RGB", "Gray") or height * width > MAX_PIXELS:
        raise ValueError("not for simplejpeg")
    return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)


def _turned(image: Tensor, data: bytes) -> Tensor:
    """The view (3, H', W') of pixels (3, H, W) that the tag in their file asks for, as by ImageOps.exif_transpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tag = orientation(Image.open(io.BytesIO(data), formats=FORMATS))
    if tag == 1:
        return image
    pixels = image.permute(1, 2, 0)
    if tag > 4:
        pixels = pixels.transpose(0, 1)
    flipped = [axis for axis in (0, 1) if tag in FLIPPED[axis]]
    return pixels.flip(flipped).contiguous().permute(2, 0, 1)


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 RGB of an opened image, which is decoded here. What goes wrong is Pillow's to raise."""
    rgb = _rgb(image)
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an opened image."""
    if image.mode in ("I", "F") and image.format != "PNG":
        raise ValueError("it has 32-bit samples")
    if image.mode.startswith("I"):  # 16-bit grey, which convert would saturate to white
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as convert("RGB"), without its warning
    return image.convert("RGB")


def _read_bytes(path: Path) -> bytes:
    for seconds in (*RETRY_SECONDS, None):
        try:
            with open_image(path) as file:
                return file.read()
        except FileNotFoundError as error:
            if seconds is None:
                raise UserError(f"{path} does not exist: restore the file or take it out of the annotations") from error
        except OSError as error:
            if seconds is None:
                raise UserError(f"{path} cannot be read ({error.strerror}): check the file") from error
        time.sleep(seconds or 0)
    raise AssertionError("the last failure raises")


def _too_large(path: str | Path) -> UserError:
    return UserError(f"{path} has more than {MAX_PIXELS} pixels: scale it down, or take it out of the annotations")
