"""Image files: every kind decodes to the RGB that Pillow shows, and every broken file is one sentence."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from detr_fabric.data import images
from detr_fabric.data.formats.orientation import read_header
from detr_fabric.data.images import read_image
from detr_fabric.errors import UserError
from tests.patching import Patch


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "RETRY_SECONDS", ())


def picture(height: int = 40, width: int = 60) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 4, y * 6, (x + y) * 2], -1).astype(np.uint8))


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def warned(recorder: pytest.WarningsRecorder) -> list[str]:
    """What was warned of, except files that other tests left open: when these are collected is chance."""
    return [str(each.message) for each in recorder if not issubclass(each.category, ResourceWarning)]


def as_rgb(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def pixels(path: Path) -> np.ndarray:
    """(H, W, 3) as read_image gives them."""
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.gif", "lossless.webp"])
def test_lossless_formats_give_pillows_pixels(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name, picture(), **({"lossless": True} if "webp" in name else {}))
    np.testing.assert_array_equal(pixels(path), as_rgb(path))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_every_png_mode_gives_pillows_rgb(tmp_path: Path, mode: str) -> None:
    path = saved(tmp_path / "a.png", picture().convert(mode))
    np.testing.assert_array_equal(pixels(path), as_rgb(path))


def test_palette_with_alpha_keeps_its_colours_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = saved(tmp_path / "a.png", picture().quantize(16), transparency=bytes(range(0, 160, 10)))
    found = pixels(path)
    assert not warned(recwarn)
    np.testing.assert_array_equal(found, as_rgb(path))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize(
    "how", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"keep_rgb": True}]
)
@pytest.mark.parametrize("size", [(40, 60), (41, 59)])
def test_jpeg_gives_pillows_pixels_whatever_its_name(
    tmp_path: Path, mode: str, how: dict[str, object], size: tuple[int, int]
) -> None:
    path = saved(tmp_path / "photo.png", picture(*size).convert(mode), format="JPEG", quality=90, **how)
    np.testing.assert_array_equal(pixels(path), as_rgb(path))


def test_a_jpeg_with_rubbish_in_it_that_pillow_forgives_is_read_by_pillow(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", picture())
    data = path.read_bytes()
    scan = data.index(b"\xff\xda")
    path.write_bytes(data[:scan] + b"rubbish" + data[scan:])
    with pytest.raises(ValueError, match="extraneous bytes"):
        images._sound_jpeg(path.read_bytes())
    np.testing.assert_array_equal(pixels(path), as_rgb(path))


def test_sixteen_bit_grey_png_is_scaled_not_saturated(tmp_path: Path) -> None:
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    path = saved(tmp_path / "a.png", Image.fromarray(grey))
    np.testing.assert_array_equal(pixels(path), np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def test_float_images_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tiff", Image.fromarray(np.ones((4, 4), dtype=np.float32)))
    with pytest.raises(UserError, match="32-bit"):
        read_image(path)


def test_broken_files_are_one_sentence_with_the_path(tmp_path: Path) -> None:
    good = {name: saved(tmp_path / name, picture()).read_bytes() for name in ("a.jpg", "b.png", "c.webp", "d.gif")}
    broken = {f"cut-{name}": data[: len(data) // 2] for name, data in good.items()}
    broken |= {"empty.jpg": b"", "page.jpg": b"<html><body>404 not found</body></html>", "text.png": b"hello"}
    broken |= {"header.jpg": good["a.jpg"][:3], "vector.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}
    for name, data in broken.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            read_image(path)
        assert str(path) in str(caught.value) and "replace the file" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg does not exist: restore"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="is a folder or a device"):
        read_image(tmp_path)


@pytest.mark.timeout(20)
def test_pipes_devices_and_endless_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    for name in ("pipe.jpg", "zero.jpg"):
        with pytest.raises(UserError, match=f"{name} is a folder or a device: replace it"):
            read_image(tmp_path / name)
        assert read_header(tmp_path / name) is None
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"sparse.jpg is larger than 1024 MB"):
        read_image(tmp_path / "sparse.jpg")


def test_a_file_that_comes_back_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch: Patch) -> None:
    data = saved(tmp_path / "a.png", picture()).read_bytes()
    failures = [OSError(5, "Input/output error"), FileNotFoundError(2, "No such file")]

    def flaky(file: Path) -> io.BytesIO:
        if failures:
            raise failures.pop()
        return io.BytesIO(data)

    monkeypatch.setattr(images, "RETRY_SECONDS", (0.0, 0.0))
    patch(images, "open_image", flaky)
    assert read_image(tmp_path / "a.png").shape == (3, 40, 60)


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels and that holds one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(3 * width + 1))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_300, 12_000, 60_000])
def test_decompression_bombs_are_refused_by_their_header(
    tmp_path: Path, side: int, recwarn: pytest.WarningsRecorder
) -> None:
    png = tmp_path / "bomb.png"
    png.write_bytes(png_header(side, side))
    jpeg = saved(tmp_path / "bomb.jpg", picture())
    data = jpeg.read_bytes()
    frame = data.index(b"\xff\xc0")  # start of frame: length, precision, height, width
    jpeg.write_bytes(data[: frame + 5] + struct.pack(">HH", side, side) + data[frame + 9 :])
    for path in (png, jpeg):
        with pytest.raises(UserError, match=f"{images.MAX_PIXELS} pixels"):
            read_image(path)
    assert not warned(recwarn)


def test_links_and_read_only_folders_are_read(tmp_path: Path) -> None:
    saved(tmp_path / "a.jpg", picture())
    folder = tmp_path / "locked"
    folder.mkdir()
    os.symlink(tmp_path / "a.jpg", folder / "b.jpg")
    folder.chmod(0o500)
    try:
        assert read_image(folder / "b.jpg").shape == (3, 40, 60)
    finally:
        folder.chmod(0o700)


@pytest.mark.process
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["a.jpg", "a.png", "a.webp", "a.bmp", "a.tiff", "a.gif"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.booleans(), st.integers(0, 255)), max_size=8),
    st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_damaged_files_give_an_image_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[float, bool, int]], kept: float
) -> None:
    """Bytes changed, half of them in the header, and the end cut off."""
    path = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    data = bytearray(saved(path, picture()).read_bytes())
    for place, in_header, value in changes:
        data[int(place * (min(64, len(data)) if in_header else len(data)))] = value
    path.write_bytes(data[: int(kept * len(data))])
    try:
        image = read_image(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.shape[1:].numel() <= images.MAX_PIXELS
        if name == "a.jpg":
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), as_rgb(path))
