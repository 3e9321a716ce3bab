"""EXIF orientation tags: every format's boxes lie on what they were drawn on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detr_fabric.config import Config, DataConfig
from detr_fabric.data.build import build_datasets
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.formats.orientation import read_header
from detr_fabric.data.images import read_image
from detr_fabric.data.orientation_tags import LOOKED_AT, orientation_tags
from detr_fabric.data.transforms import EvalTransform
from detr_fabric.errors import UserError
from detr_fabric.runtime.resume import fingerprint
from tests.checking import checked, found
from tests.coco_files import coco, image, thing, write_json
from tests.format_files import write_voc, write_yolo

BOX = [24, 4, 12, 8]  # in the turned view, which is 40 wide and 30 high


def view() -> Image.Image:
    """What a viewer shows: a white box on black."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[4:12, 24:36] = 255
    return Image.fromarray(pixels)


def photo(path: Path, orientation: int, seen: Image.Image | None = None) -> Path:
    """A file that a viewer shows as `seen`, because of its tag."""
    seen = view() if seen is None else seen
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # other turns undo themselves
    turn = {
        **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
        **{5: Image.Transpose.TRANSPOSE, 7: Image.Transpose.TRANSVERSE, **undo},
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = seen if orientation == 1 else seen.transpose(turn[orientation])
    stored.save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def on_the_object(data: CocoDetection, index: int = 0) -> bool:
    """Whether the only box of an image holds all that is white in it, and nothing else."""
    pixels, boxes, _ = data.load(index)
    x0, y0, x1, y1 = boxes.round().int().flatten().tolist()
    white = pixels.float().mean(0) > 128
    return bool(white[y0:y1, x0:x1].all()) and int(white.sum()) == (y1 - y0) * (x1 - x0)


def dataset(annotations: Path, images: Path) -> CocoDetection:
    return CocoDetection(images, read_annotations(annotations, images=images), EvalTransform(30, 60), 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_has_the_pixels_of_pillows_exif_transpose(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = photo(tmp_path / f"a.{suffix}", orientation)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    turned = read_image(path, turn=True)
    assert np.array_equal(turned.permute(1, 2, 0).numpy(), np.array(expected))
    header = read_header(path)
    assert header is not None and header.shown == tuple(turned.shape[1:])
    assert header[:2] == tuple(read_image(path).shape[1:])


def test_a_damaged_tag_leaves_the_pixels_as_stored(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    view().save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert torch.equal(read_image(tmp_path / "a.jpg", turn=True), read_image(tmp_path / "a.jpg"))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_yolo_boxes_are_of_the_turned_view_and_so_are_pixels_and_sizes(tmp_path: Path, orientation: int) -> None:
    content = coco([image(1, file_name="1.jpg"), image(2, file_name="2.jpg")], [thing(1, 1, BOX), thing(2, 2, BOX)])
    write_yolo(tmp_path, content)
    photo(tmp_path / "images" / "1.jpg", orientation)
    photo(tmp_path / "images" / "2.jpg", 1)
    train, val = build_datasets(Config(data=DataConfig(root=str(tmp_path / "data.yaml"))).resolve().data, 0)
    for data in (train, val):
        assert data.annotations.turned.tolist() == [True, False]
        assert data.annotations.sizes.tolist() == [[30, 40]] * 2
        assert on_the_object(data, 0) and on_the_object(data, 1)
        assert "1 images are turned by their EXIF orientation tag" in data.annotations.notes[1]
        assert orientation_tags(data) == []
    code, report, _ = checked("--root", tmp_path / "data.yaml", "--workers", 1)
    assert code == 0 and found(report)["images turned by their orientation tag"][1] == 1


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_copy_of_yolo_data_still_turns_its_images(tmp_path: Path, orientation: int) -> None:
    write_yolo(tmp_path, coco([image(1)], [thing(1, 1, BOX)]))
    photo(tmp_path / "images" / "1.png", orientation)
    fixed = tmp_path / "fixed.json"
    assert checked(tmp_path / "data.yaml", "--images", tmp_path / "images", "--fix", fixed)[0] == 0
    assert on_the_object(dataset(fixed, tmp_path / "images"))


def label_studio(size: tuple[int, int], **entry: Any) -> dict[str, Any]:
    width, height = size
    content = coco([image(0, file_name="1.jpg", width=width, height=height)], [thing(0, 0, **entry)])
    return content | {"info": {"version": "1.0", "contributor": "Label Studio"}}


@pytest.mark.parametrize("orientation", [3, 6])
def test_boxes_of_label_studios_coco_export_are_of_the_turned_view(tmp_path: Path, orientation: int) -> None:
    stored = Image.open(photo(tmp_path / "1.jpg", orientation)).size
    box = dataset(write_json(tmp_path / "a.json", label_studio(stored, box=BOX, segmentation=[])), tmp_path)
    assert on_the_object(box) and "1 images are turned" in box.annotations.notes[0]
    x, y, w, h = BOX
    across, down = stored[0] / 40, stored[1] / 30  # percentages of the turned view, times the size as stored
    corners = [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]
    points = [value for left, top in corners for value in (left * across, top * down)]
    scaled = [x * across, y * down, w * across, h * down]
    polygon = label_studio(stored, box=scaled, segmentation=[points])
    assert on_the_object(dataset(write_json(tmp_path / "b.json", polygon), tmp_path))
    code, report, _ = checked(tmp_path / "a.json", "--images", tmp_path, "--fix", tmp_path / "c.json")
    assert code == 0 and on_the_object(dataset(tmp_path / "c.json", tmp_path)), report


def test_an_image_is_turned_where_only_then_it_has_its_annotated_size(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "1.png", 6)
    content = coco([image(1)], [thing(1, 1, BOX)])
    voc = dataset(write_voc(tmp_path / "xml", content), tmp_path / "images")
    one = dataset(write_json(tmp_path / "a.json", content), tmp_path / "images")
    for data in (voc, one):
        assert on_the_object(data)
        assert orientation_tags(data) == [
            "1 of 1 images are turned by their EXIF orientation tag, to have their annotated size"
        ]
    code, report, _ = checked(tmp_path / "a.json", "--images", tmp_path / "images")
    assert code == 0 and found(report)["images turned by their orientation tag"][1] == 1
    Image.new("RGB", (30, 40)).save(tmp_path / "images" / "1.png")  # without a tag
    with pytest.raises(UserError, match="has height 40, but 30 in the annotations"):
        one.load(0)


@pytest.mark.parametrize("size", [{}, {"width": None, "height": None}])
def test_coco_and_voc_boxes_are_of_the_pixels_as_stored_and_the_tag_is_counted(
    tmp_path: Path, size: dict[str, Any]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    view().save(tmp_path / "images" / "1.png", exif=exif)
    one = dataset(write_json(tmp_path / "a.json", coco([image(1, **size)], [thing(1, 1, BOX)])), tmp_path / "images")
    voc = dataset(write_voc(tmp_path / "xml", coco([image(1)], [thing(1, 1, BOX)])), tmp_path / "images")
    for data in (one, voc):
        assert on_the_object(data)
        (note,) = orientation_tags(data)
        assert note.startswith("warning: 1 of 1 images have an EXIF orientation tag, which is ignored")
    code, report, _ = checked(tmp_path / "a.json", "--images", tmp_path / "images")
    assert code == 0 and found(report)["images with an orientation tag, ignored as by COCO's tools"][1] == 1


def test_of_a_large_data_set_a_share_of_the_images_is_looked_at(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", 3)
    images = [image(n, file_name="a.jpg") for n in range(2 * LOOKED_AT)]
    (note,) = orientation_tags(dataset(write_json(tmp_path / "a.json", coco(images, [thing(1, 1)])), tmp_path))
    assert f"{LOOKED_AT} of {LOOKED_AT} images that were looked at have an EXIF" in note


def test_turned_images_are_other_data_and_without_any_the_fingerprint_is_as_before(tmp_path: Path) -> None:
    write_yolo(tmp_path, coco([image(1)], [thing(1, 1, BOX)]))
    prints = []
    for orientation in (1, 3):
        photo(tmp_path / "images" / "1.png", orientation)
        prints.append(fingerprint(read_annotations(tmp_path / "data.yaml")))
    assert prints[0] != prints[1]
