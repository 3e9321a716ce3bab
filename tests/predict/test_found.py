"""What is found is an object: it can be counted, chosen, drawn, saved and handed on; images come from anywhere."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from detr_fabric import load
from detr_fabric.analysis.capture import SITES, capture
from detr_fabric.errors import UserError
from detr_fabric.predict import sources
from detr_fabric.predict.detector import Detector
from tests.predict.small import write_image, write_known


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_known(folder := tmp_path_factory.mktemp("known"))
    return folder


@pytest.fixture(scope="module")
def detr(folder: Path) -> Detector:
    return load(folder / "best.ckpt", device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """Serves photo.jpg whatever is asked for, /slow a byte at a time, and /nothing not at all."""
    content = (folder / "photo.jpg").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path == "/nothing" else 200)
            self.end_headers()
            parts = [content] if self.path != "/slow" else [content[k : k + 1] for k in range(10**4)]
            for part in parts:
                self.wfile.write(b"<html>" if self.path == "/page" else part)
                self.wfile.flush()
                threading.Event().wait(0.01 if len(parts) > 1 else 0)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("localhost", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://localhost:{http.server_port}"
        http.shutdown()
        thread.join()


def test_what_is_found_counts_and_chooses_like_a_sequence(detr: Detector, folder: Path) -> None:
    found = detr(folder / "photo.jpg", threshold=0.5)
    assert len(found) == 3 and found and [each.query for each in found] == found.queries.tolist() == [0, 1, 2]
    assert found[-1] == list(found)[2] and found[2].box == tuple(found.boxes[2].tolist())
    for which in (found.scores > 0.7, (found.scores > 0.7).numpy(), [True, True, False], slice(0, 2), [0, 1]):
        chosen = found[which]
        assert chosen.names == ["dog", "car"] and torch.equal(chosen.boxes, found.boxes[:2])
    assert found[found.scores.argmax()].names == ["dog"] and found[np.array([2, 0])].queries.tolist() == [2, 0]
    assert not found[[]] and not found[found.scores > 1]
    for wrong in (found.scores, [0.5], "dog", ["dog"]):
        with pytest.raises(TypeError, match="by whole numbers, a slice or a mask"):
            found[wrong]  # type: ignore[index]
    with pytest.raises(IndexError):
        found[3]
    with pytest.raises(IndexError):
        found[found.scores[:2] > 0]


def test_it_says_what_was_found_where(detr: Detector, folder: Path) -> None:
    found = detr(folder / "photo.jpg", threshold=0.5)
    assert repr(found) == str(found) == "2 dogs, 1 car above 0.5 in photo.jpg (640 x 480)"
    assert repr(found[3:]) == "none of the detections above 0.5 in photo.jpg (640 x 480)"
    nothing = detr(Image.open(folder / "photo.jpg"), threshold=0.97)
    assert repr(nothing) == "nothing above 0.97 in photo.jpg (640 x 480); the best score is 0.950"
    assert "in the image (640 x 480)" in repr(detr(np.array(Image.open(folder / "photo.jpg"))))
    assert repr(detr) == "DETR: resnet18, softmax attention, 2 classes, on cpu"


def test_it_is_handed_on_as_plain_data(detr: Detector, folder: Path, tmp_path: Path) -> None:
    found = detr(folder / "photo.jpg", threshold=0)
    assert json.loads(found.to_json()) == found.to_dict()
    rows = found.to_coco(139)
    truth = COCO()
    truth.dataset = {"images": [{"id": 139}], "annotations": [], "categories": [{"id": 7}, {"id": 42}]}
    truth.createIndex()
    assert [row["bbox"] for row in truth.loadRes(rows).anns.values()] == [row["bbox"] for row in rows]
    assert [row["category_id"] for row in found.to_coco(1, {0: 3})] == [3, 3]  # of other labels: left out
    assert found[:0].to_coco(1) == [] and found[:0].to_dict()["detections"] == []
    assert found[:0].to_pandas().shape == (0, 8) and len(found[:0].to_supervision()) == 0


@pytest.mark.parametrize("method, package", [("to_pandas", "pandas"), ("to_supervision", "supervision")])
def test_a_missing_package_is_one_sentence(
    method: str, package: str, detr: Detector, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{method}\(\) needs the package {package}: pip install {package}"):
        getattr(detr(folder / "photo.jpg"), method)()


@pytest.mark.process
def test_it_is_drawn_saved_and_shown_in_a_notebook(detr: Detector, folder: Path, tmp_path: Path) -> None:
    photo = write_image(tmp_path / "photo.png", 1600, 1200)
    found = detr(photo, threshold=0)
    assert found.draw().size == (1600, 1200)
    png = found._repr_png_()
    assert png is not None and Image.open(io.BytesIO(png)).size == (1024, 768)
    found.save(tmp_path / "deep" / "found.jpg")
    assert Image.open(tmp_path / "deep" / "found.jpg").size == (1600, 1200)
    before = photo.read_bytes()
    for place, words in (
        ("photo.png", "would overwrite"),
        ("found.txt", "jpg or .png"),
        ("photo.png/x.jpg", "another"),
    ):
        with pytest.raises(UserError, match=words):
            found.save(tmp_path / place)
    assert photo.read_bytes() == before and not (tmp_path / "found.txt").exists()
    photo.unlink()
    assert found._repr_png_() is None and repr(found)


def test_lists_hold_anything_and_folders_and_globs_stand_for_their_images(detr: Detector, folder: Path) -> None:
    image = Image.open(folder / "photo.jpg")
    given = [folder / "photo.jpg", str(folder / "photos"), f"{folder}/pho*.jpg", image, image, np.array(image)]
    together = detr(given, threshold=0.5, batch_size=4)
    assert [found.names for found in together] == [["dog", "car", "dog"]] * 6
    assert [found.name for found in together] == ["photo.jpg", "other.jpg", *["photo.jpg"] * 3, "the image"]
    assert [isinstance(found.source, Path) for found in together] == [True] * 3 + [False] * 3
    for several in (folder / "photos", f"{folder}/*.jpg"):
        with pytest.raises(UserError, match=r"may be many images: put it into a list, \["):
            detr(several)
    with pytest.raises(UserError, match="threshold is 2: scores lie"):
        detr(given, threshold=2)
    with pytest.raises(UserError, match="batch_size is 0"):
        detr(given, batch_size=0)


def test_a_stream_goes_on_after_an_image_that_cant_be_read_if_asked_to(detr: Detector, folder: Path) -> None:
    given = [folder / "photo.jpg", "nothing.jpg", folder / "best.ckpt", folder / "photos", 42]
    said: list[UserError] = []
    assert [found.name for found in detr.stream(given, batch_size=2, unreadable=said.append)] == [
        "photo.jpg",
        "other.jpg",
    ]
    assert sorted(str(error).split(":")[0].split("/")[-1] for error in said) == sorted(
        ["nothing.jpg", "best.ckpt is no JPEG, PNG, WEBP, BMP, TIFF or GIF image", "int is no image"]
    )
    with pytest.raises(UserError, match=r"nothing.jpg: no such file"):
        list(detr.stream(given))


def test_a_stream_reads_endless_frames_only_a_few_ahead(detr: Detector, folder: Path) -> None:
    taken = []

    def frames() -> Iterator[Image.Image]:
        while True:
            taken.append(Image.open(folder / "photo.jpg"))
            yield taken[-1]

    stream = detr.stream(frames(), threshold=0.5)
    assert [len(next(stream)) for _ in range(3)] == [3, 3, 3] and len(taken) <= 6


def test_an_address_is_loaded_within_limits(
    detr: Detector, server: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = detr(f"{server}/a/dög%20one.jpg?x=1", threshold=0.5)
    assert repr(found) == "2 dogs, 1 car above 0.5 in dög one.jpg (640 x 480)"
    assert found.draw().size == (640, 480)  # without loading it again
    for path, words in (("nothing", "404"), ("page", "is no JPEG")):
        with pytest.raises(UserError, match=f"{server}/{path}.*{words}"):
            detr(f"{server}/{path}")
    with pytest.raises(UserError, match="can't be loaded.*check the address"):
        detr("http://localhost:1/photo.jpg")
    monkeypatch.setattr(sources, "SECONDS", 0.1)
    with pytest.raises(UserError, match="not loaded after 0.1 s"):
        detr(f"{server}/slow")
    monkeypatch.setattr(sources, "MAX_BYTES", 2**10)
    with pytest.raises(UserError, match="more than 0.000976562 MB"):
        detr(f"{server}/photo.jpg")


def test_attention_is_what_the_blocks_compute_without_padding(folder: Path) -> None:
    detr = load(folder / "best.ckpt", "cpu")
    detr.config = replace(detr.config, data=replace(detr.config.data, pad_multiple=32))  # 64 x 85 pixels become 64 x 96
    seen = detr.attention(folder / "photo.jpg")
    with capture(detr.model) as captured:
        detr(folder / "photo.jpg")
    weights = [torch.stack([weights[0] for _, weights in sorted(captured.weights[site].items())]) for site in SITES]
    encoder, decoder, cross = weights
    torch.testing.assert_close(seen.encoder_self, encoder.unflatten(3, (8, 12)).unflatten(2, (8, 12))[..., :11, :, :11])
    torch.testing.assert_close(seen.decoder_self, decoder)
    torch.testing.assert_close(seen.decoder_cross, cross.unflatten(-1, (8, 12))[..., :11])
    assert seen.decoder_cross.shape == (2, 4, 3, 8, 11) and seen.encoder_self.shape == (1, 4, 8, 11, 8, 11)
    only = detr.attention(folder / "photo.jpg", sites=["decoder_cross"])
    assert torch.equal(only.decoder_cross, seen.decoder_cross) and only.encoder_self.numel() == 0


def test_devices_are_named_in_one_way_and_those_that_are_not_there_refused(folder: Path) -> None:
    for same in ({"device": "cpu"}, {"accelerator": "cpu"}, {"device": torch.device("cpu")}):
        assert load(folder / "best.ckpt", **same).fabric.device == torch.device("cpu")
    for device, words in (("gpu", "choose auto, cpu, cuda"), ("cuda:x", "choose auto"), ("cpu:1", "choose auto")):
        with pytest.raises(UserError, match=f"device {device}: {words}"):
            load(folder / "best.ckpt", device)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device is visible"):
            load(folder / "best.ckpt", "cuda:1")
