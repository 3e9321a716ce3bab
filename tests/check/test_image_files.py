"""The check decodes all image files, names the broken ones, and survives files that crash their decoder."""

from __future__ import annotations

import io
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_fabric.check import decoding
from detr_fabric.data import images as image_files
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.errors import UserError
from tests.checking import checked, clean, found
from tests.coco_files import DAMAGE, coco, image, thing, write_images, write_json


def broken_images(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """One image of each fault with ids 1, 2, …, id 0 being fine; and what is expected of each file."""
    names = ["good", *DAMAGE, "png cut", "folder", "pipe"]
    content = coco(
        [image(number, file_name=f"{name}.jpg") for number, name in enumerate(names)],
        [thing(number, number) for number in range(len(names))],
    )
    write_images(folder, content)
    path = {name: folder / f"{name}.jpg" for name in names}
    for name, damage in DAMAGE.items():
        damage(path[name])
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(path["png cut"], "PNG")
    path["png cut"].write_bytes(path["png cut"].read_bytes()[:1500])
    for name in ("folder", "pipe"):
        path[name].unlink()
    path["folder"].mkdir()
    os.mkfifo(path["pipe"])  # reading it would wait for ever
    return content, {
        "missing": "missing",
        "empty": "empty",
        "truncated": "damaged or not supported",
        "web page": "no JPEG, PNG, WEBP, BMP, TIFF or GIF image",
        "other size": "another size than its entry",
        "bomb": f"more than {image_files.MAX_PIXELS} pixels",
        "png cut": "damaged or not supported",
        "folder": "a folder or a device",
        "pipe": "a folder or a device",
    }


@pytest.mark.parametrize("workers", [1, 3])
def test_every_broken_file_is_listed_and_left_out_of_the_copy(tmp_path: Path, workers: int) -> None:
    content, expected = broken_images(tmp_path / "images")
    source, out = write_json(tmp_path / "a.json", content), tmp_path / "out.json"
    code, report, _ = checked(source, "--images", tmp_path / "images", "--workers", workers)
    assert code == 1
    listed = {what: entry for what, entry in found(report).items() if what.startswith("images")}
    for number, image_entry in enumerate(content["images"]):
        fault = expected.get(image_entry["file_name"].removesuffix(".jpg"))
        naming = [what for what, (_, _, entries) in listed.items() if f"{number} {tmp_path}" in entries]
        assert len(naming) == (fault is not None)
        assert fault is None or fault in naming[0]
    assert all(training == "stops" for training, _, _ in listed.values())
    assert "(40 x 30" not in report and "(30 x 40 in the file, 40 x 30 in its entry)" in report
    assert found(report)["annotations of images at which training stops"][1] == len(expected)

    assert checked(source, "--images", tmp_path / "images", "--workers", workers, "--fix", out)[0] == 0
    assert read_annotations(out).image_ids.tolist() == [0]
    code, report, _ = checked(out, "--images", tmp_path / "images", "--workers", workers)
    assert (code, found(report)) == (0, {})


@pytest.mark.process
def test_a_file_that_kills_its_decoder_is_named_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = coco([image(number) for number in range(12)], [])
    folder = write_images(tmp_path / "images", content)
    decode = image_files.read_image

    def deadly(path: Path, *args: Any) -> Any:
        if path.stem in ("4", "9"):
            os.kill(os.getpid(), signal.SIGKILL)  # SIGSEGV would do the same, loudly
        return decode(path, *args)

    monkeypatch.setattr(image_files, "read_image", deadly)
    for workers in ("1", "3", "20"):
        args = (write_json(tmp_path / "a.json", content), "--images", folder, "--workers", workers)
        code, report, _ = checked(*args)
        assert code == 1
        fault = ("stops", 2, f"4 {folder}/4.png 9 {folder}/9.png")
        assert found(report) == {"images whose file kills its decoder": fault}


def test_sizes_that_entries_lack_come_from_the_files(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", clean())
    content = coco(
        [{"id": 1, "file_name": "1.png"}, image(2, height="30")], [thing(1, 1, box=[40, 0, 9, 9]), thing(2, 2)]
    )
    source, out = write_json(tmp_path / "a.json", content), tmp_path / "out.json"
    report = checked(source, "--images", folder, "--workers", "1", "--fix", out)[1]
    assert found(report)["annotations whose box has no area in its image"] == ("drops", 1, "1")
    assert read_annotations(out).sizes.tolist() == [[30, 40]] * 2
    assert "annotations whose box has no area" not in checked(source)[1]


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def test_damaged_images_give_an_image_or_a_fault_and_never_kill(tmp_path: Path) -> None:
    rng = random.Random(5)
    y, x = np.mgrid[:30, :40]
    picture = Image.fromarray(np.stack([x * 6, y * 8, x * y % 251], -1).astype(np.uint8))
    folder, names = tmp_path / "images", []
    folder.mkdir()
    for kind in FORMATS:
        for variant in ({}, {"compression": "tiff_lzw"} if kind == "TIFF" else {"optimize": True}):
            buffer = io.BytesIO()
            picture.save(buffer, kind, **variant)
            data = buffer.getvalue()
            for number in range(25):
                damaged = bytearray(data)
                if number % 2:
                    damaged = damaged[: rng.randrange(len(data))]
                for _ in range(rng.randint(1, 6)):
                    if damaged:
                        damaged[rng.randrange(min(len(damaged), rng.choice([64, len(data)])))] = rng.randrange(256)
                names.append(f"{kind}-{len(names)}.jpg")
                (folder / names[-1]).write_bytes(damaged)
    assert len(names) == 300

    content = coco([{"id": number, "file_name": name} for number, name in enumerate(names)], [])
    results = decoding.read_sizes(folder, content["images"], 2, lambda done: None)
    faults = [result for result in results if isinstance(result, decoding.FileProblem)]
    assert 100 < len(faults) < 300 and not any("kills" in fault.kind for fault in faults)
    for name, result in zip(names, results, strict=True):  # none killed its process: this one is safe, too
        try:
            assert tuple(image_files.read_image(folder / name).shape[-2:]) == result[:2]
        except UserError as error:
            assert isinstance(result, decoding.FileProblem) and "\n" not in str(error)
