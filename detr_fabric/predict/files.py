"""From image files to detections in a file, and pictures of them; the work of __main__.py."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from detr_fabric.analysis.figures import detection_figure
from detr_fabric.analysis.maps import attention_maps
from detr_fabric.data.formats.orientation import read_header
from detr_fabric.data.transforms import resized_size
from detr_fabric.errors import UserError
from detr_fabric.launcher import launched
from detr_fabric.predict.coco import ids_of_file, own_ids
from detr_fabric.predict.detector import AHEAD, Detector, load
from detr_fabric.predict.found import Found
from detr_fabric.predict.paths import ImageFile, find_images
from detr_fabric.predict.sources import Item, reading_threads
from detr_fabric.runtime.files import check_outputs, replace_text, writing
from detr_fabric.terminal import counted, say

if TYPE_CHECKING:
    from detr_fabric.predict.settings import Settings


def predict(settings: Settings) -> None:
    """Predicts all files and writes everything into settings.out.

    Raises UserError for paths that name nothing, a file that is no checkpoint, a folder that can't be written, and
    where no file could be read.
    """
    nodes, per_node = launched() or (1, 1)
    if nodes * per_node > 1:
        raise UserError(f"prediction runs in one process, not in {nodes * per_node}: start it with python, once")
    out = Path(settings.out)
    files = find_images(settings.paths, leave_out=out)
    inputs: list[str | Path | None] = [settings.checkpoint, settings.annotations, *(file.path for file in files)]
    check_outputs(f"--out {out}", [out / "predictions.json", *picture_files(files, out / "pictures")], inputs)
    detector = load(settings.checkpoint, settings.accelerator, settings.precision, settings.dc5)
    if settings.annotations is None:
        ids = own_ids(files, detector.categories)
    else:
        ids = ids_of_file(Path(settings.annotations), files, detector.categories, detector.config.data.aliases)
        if len(ids.files) < len(files):
            say(f"{len(files) - len(ids.files)} of {len(files)} files are not in {settings.annotations}: left out")
    files, targets = ids.files, picture_files(ids.files, out / "pictures")
    with writing(f"--out {out}", "choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results: dict[int, list[dict[str, Any]]] = {}
    left_out, turned, best = 0, 0, 0.0
    numbers = {file.path: number for number, file in enumerate(files)}

    def leave_out(error: UserError) -> None:
        nonlocal left_out
        left_out += 1
        say(f"left out: {error}", sys.stderr)

    with (
        counted("images", len(files)) as progress,
        reading_threads() as pool,
        writing(f"--out {out}", "choose another folder"),
    ):
        drawing: deque[Future[None]] = deque()
        ordered = in_order(files, detector, settings.batch_size, pool)
        for found, image in detector.each(ordered, settings.threshold, settings.batch_size, leave_out):
            assert isinstance(found.source, Path)
            number, header = numbers[found.source], read_header(found.source)
            results[number] = found.to_coco(ids.images[number], ids.categories)
            turned += header is not None and header.orientation > 1
            best, found = max(best, found.best), replace(found, source=image)  # drawn without reading it again
            if settings.pictures:
                drawing.append(pool.submit(found.save, targets[number]))
            if settings.attention and len(found):
                figure = attention_figure(detector, found, Path(settings.checkpoint).stem)
                drawing.append(pool.submit(_save, figure, out / "attention" / f"{found.name}.png"))
            while len(drawing) > AHEAD * settings.batch_size:
                drawing.popleft().result()
            progress(len(results) + left_out)
        for future in drawing:
            future.result()
    if not results:
        raise UserError(f"none of {len(files)} files could be read: see above")
    rows = [row for number in sorted(results) for row in results[number]]
    with writing(f"--out {out}", "choose another folder"):
        replace_text(out / "predictions.json", json.dumps(rows) + "\n")
    seconds = time.perf_counter() - started
    say(f"{len(rows)} detections (score ≥ {settings.threshold:g}) in {len(results)} images, in {seconds:.1f} s: {out}")
    if not rows:
        say(f"the best score there was is {best:.3f}: see what --threshold {math.floor(best * 100) / 100:g} finds")
    if turned:
        say(f"{turned} of them were turned by their EXIF orientation tag, as viewers do, and so are their boxes")
    if left_out:
        say(f"{left_out} of {len(files)} files were left out: see above", sys.stderr)


def in_order(
    files: Sequence[ImageFile], detector: Detector, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[Item]:
    """The files as they are predicted: batches hold images of like shapes."""
    if batch_size > 1:
        shapes = pool.map(lambda file: _shape(file.path, detector), files)
        files = [file for _, file in sorted(zip(shapes, files, strict=True), key=lambda pair: pair[0])]
    return (Item(path, name) for path, name in files)


def picture_files(files: Sequence[ImageFile], folder: Path) -> list[Path]:
    """Where the pictures go."""
    return [
        folder / (name if Path(name).suffix.lower() in (".jpg", ".jpeg", ".png") else f"{name}.jpg")
        for _, name in files
    ]


def attention_figure(detector: Detector, found: Found, model_name: str) -> Image.Image:
    """The decoder cross-attention of each detection. The image goes through the model again, alone: without padding
    beside it, and without the memory that the attention of a whole batch would take."""
    prepared = detector.prepare(found.image)
    batch, _ = detector.fabric.to_device(detector.batch([prepared]))
    with detector.fabric.autocast():
        maps, _ = attention_maps(detector.model, model_name, prepared.image, batch, detector.categories.legible_names())
    queries = dict.fromkeys(found.queries.tolist())  # with focal loss one query may find several classes
    return detection_figure(maps, list(queries), found.name)


def _shape(path: Path, detector: Detector) -> tuple[int, int]:
    """(height, width) that the model will see; (0, 0) where the file does not say."""
    header = read_header(path)
    if header is None or min(header.shown) == 0:
        return 0, 0
    return resized_size(*header.shown, detector.scale, detector.max_size)


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=92)
