"""From image files to detections in COCO's result format, and pictures of them; the work of predict.py."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from detr_fabric.analysis.capture import Site, observe
from detr_fabric.analysis.measures import crop_padding
from detr_fabric.analysis.sheets import Look, detection_sheet
from detr_fabric.batch import normalize
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.data.images import FORMATS, read_image
from detr_fabric.data.paths import ImageFile, find_images, image_ids
from detr_fabric.data.transforms import resized_size
from detr_fabric.detector import Detector, Found, Prepared, load
from detr_fabric.errors import UserError
from detr_fabric.launch import launched
from detr_fabric.model.detr import post_process
from detr_fabric.output import replace_text, writing
from detr_fabric.pictures import Boxes, Picture, draw
from detr_fabric.progress import counted

if TYPE_CHECKING:
    from detr_fabric.predict import Settings

AHEAD = 2  # batches that are read while one is predicted, and drawn after it
ORIENTATION = 0x0112  # the EXIF tag


class Seen(NamedTuple):
    """One file and what was found in it."""

    number: int  # its place among the files
    image: Tensor  # (3, H, W) uint8 RGB
    prepared: Prepared
    found: Found
    turned: bool  # whether its orientation tag asks for another view


def predict(checkpoint: str, settings: Settings) -> None:
    """Predicts all files and writes everything into settings.out.

    Raises UserError for paths that name nothing, a file that is no checkpoint, a folder that can't be written, and
    where no file could be read.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names of any script on terminals of any encoding
    nodes, per_node = launched() or (1, 1)
    if nodes * per_node > 1:
        raise UserError(f"prediction runs in one process, not in {nodes * per_node}: start it with python, once")
    out = Path(settings.out)
    files = find_images(settings.paths, leave_out=out)
    ids, targets = image_ids(files), picture_files(files, out / "pictures")
    detector = load(checkpoint, settings.accelerator, settings.precision, settings.dc5)
    with writing(f"--out {out}", "choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results: dict[int, list[dict[str, Any]]] = {}
    turned = 0
    with counted(len(files)) as progress, _threads() as pool, writing(f"--out {out}", "choose another folder"):
        drawing: deque[Future[None]] = deque()
        for done, seen in enumerate(detect_files(files, detector, settings.batch_size, settings.threshold, pool), 1):
            if isinstance(seen, UserError):
                print(f"left out: {seen}", file=sys.stderr, flush=True)
            else:
                results[seen.number] = coco_results(ids[seen.number], seen.found, detector)
                turned += seen.turned
                if settings.pictures:
                    drawing.append(pool.submit(_draw, seen, targets[seen.number], detector))
                if settings.attention and len(seen.found.queries):
                    name = files[seen.number].name
                    sheet = attention_sheet(detector, seen, name, Path(checkpoint).stem)
                    drawing.append(pool.submit(_save, sheet, out / "attention" / f"{name}.png"))
            while len(drawing) > AHEAD * settings.batch_size:
                drawing.popleft().result()
            progress(done)
        for future in drawing:
            future.result()
    if not results:
        raise UserError(f"none of {len(files)} files could be read: see above")
    rows = [row for number in sorted(results) for row in results[number]]
    with writing(f"--out {out}", "choose another folder"):
        replace_text(out / "predictions.json", json.dumps(rows) + "\n")
    seconds = time.perf_counter() - started
    print(
        f"{len(rows)} detections (score ≥ {settings.threshold:g}) in {len(results)} images, in {seconds:.1f} s: {out}"
    )
    if turned:
        print(f"{turned} of them have an orientation tag, which is not heeded, as in training: turn their pixels first")
    if len(results) < len(files):
        print(f"{len(files) - len(results)} of {len(files)} files were left out: see above", file=sys.stderr)


def detect_files(
    files: Sequence[ImageFile], detector: Detector, batch_size: int, threshold: float, pool: ThreadPoolExecutor
) -> Iterator[Seen | UserError]:
    """What was found in each file, or why it can't be read, batch by batch of images of like shapes."""
    order = list(range(len(files)))
    if batch_size > 1:
        shapes = list(pool.map(lambda file: _shape(file.path, detector), files))
        order.sort(key=shapes.__getitem__)
    batches = deque(order[first : first + batch_size] for first in range(0, len(order), batch_size))
    reading: deque[list[tuple[int, Future[tuple[Tensor, Prepared, bool] | UserError]]]] = deque()
    while batches or reading:
        while batches and len(reading) <= AHEAD:
            numbers = batches.popleft()
            reading.append([(n, pool.submit(_read, files[n].path, detector)) for n in numbers])
        read = [(number, future.result()) for number, future in reading.popleft()]
        yield from (result for _, result in read if isinstance(result, UserError))
        good = [(number, result) for number, result in read if not isinstance(result, UserError)]
        if good:
            answers = detector.detect([prepared for _, (_, prepared, _) in good])
            for (number, (image, prepared, turned)), answer in zip(good, answers, strict=True):
                yield Seen(number, image, prepared, detector.above(threshold, answer), turned)


def coco_results(image_id: int | str, found: Found, detector: Detector) -> list[dict[str, Any]]:
    """Detections in COCO's result format, with widths and heights as scoring computes them."""
    boxes = torch.cat([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], 1).tolist()  # xywh
    return [
        {"image_id": image_id, "category_id": detector.categories.id(label), "bbox": box, "score": score}
        for label, box, score in zip(found.labels.tolist(), boxes, found.scores.tolist(), strict=True)
    ]


def picture_files(files: Sequence[ImageFile], folder: Path) -> list[Path]:
    """Where the pictures go. Raises UserError where that is one of the files."""
    targets = [
        folder / (name if Path(name).suffix.lower() in (".jpg", ".jpeg", ".png") else f"{name}.jpg")
        for _, name in files
    ]
    overwritten = {target.resolve() for target in targets} & {file.path.resolve() for file in files}
    if overwritten:
        raise UserError(f"--out: {min(overwritten)} would be overwritten by its own picture; choose another folder")
    return targets


@torch.no_grad()
def attention_sheet(detector: Detector, seen: Seen, name: str, model_name: str) -> Image.Image:
    """The decoder cross-attention of each detection. The image goes through the model again, alone: without padding
    beside it, and without what the attention of a whole batch would take of memory."""
    (batch, (target,)) = detector.fabric.to_device(detector.batch([seen.prepared]))
    layers: list[Tensor] = []
    masks: list[Tensor] = []

    def keep(site: Site, layer: int, weights: Tensor, mask: Tensor) -> None:
        if site == "decoder_cross":
            layers.append(crop_padding(weights.float(), mask, queries_too=False)[0])
            masks[:] = [mask[0]]

    with observe(detector.model, keep) as detr, detector.fabric.autocast():
        logits, boxes = detr(*normalize(batch))
    sizes = torch.tensor([target.size], device=detector.fabric.device)
    scores, labels, _ = post_process(logits[-1], boxes[-1], sizes)
    (mask,) = masks
    h, w = int((~mask[:, 0]).sum()), int((~mask[0]).sum())
    categories = detector.categories
    look = Look(
        model=model_name,
        mapping=detr.transformer.decoder.layers[-1].multihead_attn.mapping,  # type: ignore[union-attr, arg-type]
        image=seen.prepared.image,
        scores=scores[0].cpu(),
        labels=labels[0].cpu(),
        boxes=cxcywh_to_xyxy(boxes[-1, 0]).cpu(),
        cross=torch.stack(layers).unflatten(-1, (h, w)).cpu(),
        true_labels=torch.zeros(0, dtype=torch.int64),
        true_boxes=torch.zeros(0, 4),
        matched={},
        class_names=[categories.name(label) for label in range(categories.num_classes)],
    )
    title = name.encode("utf-8", "replace").decode()  # names of files need not be text
    return detection_sheet(look, seen.found.queries.tolist(), title)


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that read and draw, for Pillow and torch let others run meanwhile. An error drops what waits."""
    pool = ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _read(path: Path, detector: Detector) -> tuple[Tensor, Prepared, bool] | UserError:
    try:
        image = read_image(path)
    except UserError as error:
        return error
    return image, detector.prepare(image), _header(path, lambda opened: opened.getexif().get(ORIENTATION, 1), 1) != 1


def _shape(path: Path, detector: Detector) -> tuple[int, int]:
    """(height, width) that the model will see; (0, 0) where the file does not say."""
    width, height = _header(path, lambda opened: opened.size, (0, 0))
    return resized_size(height, width, detector.scale, detector.max_size) if min(height, width) > 0 else (0, 0)


def _header(path: Path, ask: Callable[[Image.Image], Any], unknown: Any) -> Any:
    """What an image's header says."""
    with suppress(Exception), Image.open(path, formats=FORMATS) as opened:  # broken files are read_image's to name
        return ask(opened)
    return unknown


def _draw(seen: Seen, path: Path, detector: Detector) -> None:
    found, categories = seen.found, detector.categories
    names = [categories.name(label) for label in range(categories.num_classes)]
    predicted = Boxes(found.boxes, found.labels, found.scores)
    _save(draw(Picture(seen.image, "", predicted), names), path)


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=92)
