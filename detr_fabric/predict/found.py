"""What was found in one image: detections that can be counted, chosen, drawn, saved and handed on.

Shapes: N detections, H×W pixels of the image as viewers show it.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.images import read_image
from detr_fabric.draw import Boxes, Picture, draw
from detr_fabric.errors import UserError
from detr_fabric.predict.coco import category_ids_of
from detr_fabric.runtime.files import check_outputs, writing
from detr_fabric.terminal import noun

if TYPE_CHECKING:
    import pandas
    import supervision

IN_A_NOTEBOOK = 1024  # longest side of a picture there, in pixels


class Detection(NamedTuple):
    """One object that was found."""

    label: int  # the model's own class id, from 0
    name: str  # of the class
    score: float  # in [0, 1]
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels; may reach a little beyond the image
    query: int  # the object query that found it


@dataclass(frozen=True, eq=False, repr=False)
class Found:
    """What was found in one image, by descending score.

    >>> found = detr("photo.jpg", threshold=0.5)
    >>> found
    2 dogs, 1 car above 0.5 in photo.jpg (640 x 480)
    >>> len(found), found.names, bool(found[found.scores > 0.99])
    (3, ['dog', 'car', 'dog'], False)
    >>> for detection in found[:2]:
    ...     print(detection.name, round(detection.score, 2), [round(side) for side in detection.box])
    dog 0.95 [64, 48, 192, 240]
    car 0.8 [256, 96, 512, 384]
    """

    scores: Tensor
    """(N,) float32 in [0, 1]."""
    labels: Tensor
    """(N,) int64, the model's own class ids, from 0."""
    boxes: Tensor
    """(N, 4) float32: left, top, right, bottom in pixels of the image; may reach a little beyond it."""
    queries: Tensor
    """(N,) int64, the object queries that found them; one query may have found several classes in its box."""
    categories: Categories
    """The classes that the model knows."""
    threshold: float
    """Smallest score of a detection."""
    best: float
    """The highest score that there was, above the threshold or not."""
    size: tuple[int, int]
    """(H, W) of the image."""
    name: str
    """What the image is called: the name of its file, with the folders below the one that was given."""
    source: Path | Tensor
    """The image: its file, or (3, H, W) uint8 RGB."""

    @property
    def names(self) -> list[str]:
        """The class of each detection."""
        return [self.categories.name(label) for label in self.labels.tolist()]

    @property
    def image(self) -> Tensor:
        """(3, H, W) uint8 RGB, as viewers show it; read again from its file, where there is one. Raises UserError where
        that is gone."""
        return read_image(self.source, turn=True) if isinstance(self.source, Path) else self.source

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        rows = (self.labels.tolist(), self.names, self.scores.tolist(), self.boxes.tolist(), self.queries.tolist())
        for label, name, score, (left, top, right, bottom), query in zip(*rows, strict=True):
            yield Detection(label, name, score, (left, top, right, bottom), query)

    @overload
    def __getitem__(self, which: int) -> Detection: ...

    @overload
    def __getitem__(self, which: slice | Tensor | np.ndarray | Sequence[int]) -> Found: ...

    def __getitem__(self, which: int | slice | Tensor | np.ndarray | Sequence[int]) -> Detection | Found:
        """One detection by its number; or those of a slice, of numbers, or of a mask (N,) of bools.

        >>> found = detr("photo.jpg", threshold=0.5)
        >>> found[0].name, found[-1].name, found[1:].names
        ('dog', 'dog', ['car', 'dog'])
        >>> found[found.scores > 0.7]
        1 dog, 1 car above 0.5 in photo.jpg (640 x 480)
        >>> found[[detection.name == "dog" for detection in found]]
        2 dogs above 0.5 in photo.jpg (640 x 480)
        """
        if isinstance(which, int):
            number = range(len(self))[which]  # raises IndexError
            return next(iter(self[number : number + 1]))
        if not isinstance(which, slice):
            numbers = np.asarray(which.cpu() if isinstance(which, Tensor) else which).reshape(-1)
            if numbers.size and numbers.dtype.kind not in "biu":
                raise TypeError("choose detections by whole numbers, a slice or a mask, as found[found.scores > 0.5]")
            which = torch.tensor(numbers.tolist(), dtype=torch.bool if numbers.dtype.kind == "b" else torch.int64)
        scores, labels, boxes, queries = (x[which] for x in (self.scores, self.labels, self.boxes, self.queries))
        return replace(self, scores=scores, labels=labels, boxes=boxes, queries=queries)

    def __repr__(self) -> str:
        counts = Counter(self.names).most_common()
        found = ", ".join(f"{number} {noun(name, number)}" for name, number in counts)
        height, width = self.size
        none_of_them = self.best >= self.threshold  # this is a choice of what was found
        found = found or ("none of the detections" if none_of_them else "nothing")
        rest = "" if counts or none_of_them else f"; the best score is {self.best:.3f}"
        return f"{found} above {self.threshold:g} in {self.name} ({width} x {height}){rest}"

    def _repr_png_(self) -> bytes | None:
        """The picture that a notebook shows; none where the image is gone."""
        try:
            picture, file = self.draw(), io.BytesIO()
        except UserError:
            return None
        picture.thumbnail((IN_A_NOTEBOOK, IN_A_NOTEBOOK))
        picture.save(file, "png")
        return file.getvalue()

    def draw(self, side: int = 512) -> Image.Image:
        """The image with the boxes, names and scores on it. A small image is enlarged by a whole factor, to a longer
        side of about `side` pixels, so that text can be read.

        >>> detr("photo.jpg").draw().size
        (640, 480)
        """
        boxes = Boxes(self.boxes, self.labels, self.scores)
        return draw(Picture(self.image, "", boxes), self.categories.legible_names(), side)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture that draw() makes, and the folder for it. Raises UserError for a place that can't be
        written, a name that is not of an image, and the image's own file, which is never replaced.

        >>> detr("photo.jpg").save("pictures/found.jpg")
        """
        path = Path(path)
        check_outputs(f"save({str(path)!r})", [path], [self.source if isinstance(self.source, Path) else None])
        picture = self.draw()
        with writing(f"{path} can't be written", "choose another place"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                picture.save(path, quality=92)
            except ValueError as error:  # Pillow knows formats by the ends of names
                raise UserError(f"{path}: what image is to be written? Let its name end in .jpg or .png") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings.

        >>> about = detr("photo.jpg", threshold=0.5).to_dict()
        >>> about["image"], about["width"], about["height"], about["threshold"]
        ('photo.jpg', 640, 480, 0.5)
        >>> first = about["detections"][0]
        >>> first["label"], first["name"], round(first["score"], 2), [round(side) for side in first["box"]]
        (0, 'dog', 0.95, [64, 48, 192, 240])
        """
        height, width = self.size
        detections = [detection._asdict() | {"box": list(detection.box)} for detection in self]
        about = {"image": self.name, "width": width, "height": height, "threshold": self.threshold}
        return about | {"detections": detections}

    def to_json(self) -> str:
        """to_dict() on one line."""
        return json.dumps(self.to_dict())

    def to_coco(self, image_id: int, category_ids: Mapping[int, int] | None = None) -> list[dict[str, Any]]:
        """Rows in COCO's result format: box as left, top, width, height, with the names of file and class beside the
        numbers.

        category_ids: by label; None: those of `category_ids_of`. Detections of other labels are left out. For scoring,
        look for all detections: threshold=0.

        >>> [row["category_id"] for row in detr("photo.jpg", threshold=0).to_coco(image_id=139)]
        [7, 42, 7]
        """
        ids = category_ids_of(self.categories) if category_ids is None else category_ids
        boxes = torch.cat([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], 1).tolist()  # as scoring does
        return [
            {"image_id": image_id, "category_id": ids[found.label], "bbox": box, "area": box[2] * box[3]}
            | {"score": found.score, "file_name": self.name, "category": found.name}
            for found, box in zip(self, boxes, strict=True)
            if found.label in ids
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """A row a detection. Needs pandas; raises UserError without it.

        >>> print(detr("photo.jpg", threshold=0.5).to_pandas().round(2).to_string())
           label name  score   left   top  right  bottom  query
        0      0  dog   0.95   64.0  48.0  192.0   240.0      0
        1      1  car   0.80  256.0  96.0  512.0   384.0      1
        2      0  dog   0.60   32.0  24.0  160.0   144.0      2
        """
        columns = {"label": self.labels, "name": self.names, "score": self.scores}
        columns |= dict(zip(("left", "top", "right", "bottom"), self.boxes.unbind(1), strict=True))
        columns["query"] = self.queries
        rows = {name: np.asarray(column) for name, column in columns.items()}
        frame: pandas.DataFrame = _package("pandas", "to_pandas").DataFrame(rows)
        return frame

    def to_supervision(self) -> supervision.Detections:
        """For the package supervision, which tracks, counts and draws; raises UserError without it.

        >>> detections = detr("photo.jpg", threshold=0.5).to_supervision()
        >>> detections.xyxy.shape, detections.class_id.tolist(), detections["class_name"].tolist()
        ((3, 4), [0, 1, 0], ['dog', 'car', 'dog'])
        """
        detections: supervision.Detections = _package("supervision", "to_supervision").Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )
        return detections


def _package(name: str, method: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{method}() needs the package {name}: pip install {name}") from error
