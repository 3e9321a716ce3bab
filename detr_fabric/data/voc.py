"""Pascal VOC XML files → what a COCO annotation file would hold.

Categories have their names as ids. VOC's boxes count pixels from 1 and include the last one. Objects marked difficult
become crowds: neither trained on nor counted as missed, and detections of them not as false, as in VOC's evaluation.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from detr_fabric.data.categories import Categories, category_id
from detr_fabric.data.columns import inside
from detr_fabric.errors import UserError

LISTS = Path("ImageSets", "Main")  # where VOC says which images are for training and for validation
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Builder(ElementTree.TreeBuilder):
    """Refuses document types: annotations need none, and entities can be bombs."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("declares a document type, which annotations don't need; remove its <!DOCTYPE>")


def read_voc(path: Path, training: Categories | None = None) -> dict[str, Any]:
    """All XML files of a folder, or those that a list in ImageSets/Main names.

    training: categories whose ids classes of the same name get.

    Raises UserError naming the file, and the line or the object, of what is no annotation.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    names = set[str]()
    for file in sorted(path.glob("[!.]*.xml")) if path.is_dir() else _listed(path):
        root = _parse(file)
        image: dict[str, Any] = {"id": file.stem, "file_name": (root.findtext("filename") or "").strip()}
        for side in ("width", "height"):
            if pixels := _number(root, f"size/{side}", file, "its image", missing=0):
                image[side] = pixels  # some programs write 0 where they don't know
        images.append(image)
        for number, node in enumerate(root.findall("object"), 1):
            name = (node.findtext("name") or "").strip()
            if not name:
                raise UserError(f"{file}: object {number} has no name; correct it")
            names.add(name)
            where = f"object {number} ({name})"
            xmin, ymin, xmax, ymax = (_number(node, f"bndbox/{corner}", file, where) for corner in CORNERS)
            row = {"id": f"{file.name} {where}", "image_id": file.stem, "category_id": category_id(name, training)}
            box = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
            difficult = (node.findtext("difficult") or "").strip() == "1"
            annotations.append(row | {"bbox": box, "iscrowd": int(difficult)})
    if training is None and not names:
        raise UserError(f"{path}: none of its .xml files has an object, so there are no classes; add annotated images")
    if training is not None:
        categories = [{"id": id, "name": name} for id, name in zip(training.ids, training.names, strict=True)]
    else:
        categories = [{"id": name, "name": name} for name in sorted(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _listed(path: Path) -> list[Path]:
    """The XML files of a list: a name a line, and perhaps more behind it; they are in Annotations, two folders up."""
    folder = path.resolve().parents[2] / "Annotations" if len(path.resolve().parents) > 2 else path.parent
    try:
        names = [line.split()[0] for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): check the path of the annotations") from error
    if not names:
        raise UserError(f"{path} names no image: add a name a line")
    for name in names:
        if not inside(name) or not os.path.isfile(folder / f"{name}.xml"):  # Path's raises for overlong names
            raise UserError(f"{path} names {name[:100]!r}, which has no .xml file in {folder}: correct the list")
    return [folder / f"{name}.xml" for name in names]


def _parse(file: Path) -> Element:
    try:
        root = ElementTree.fromstring(file.read_bytes(), ElementTree.XMLParser(target=_Builder()))
    except ElementTree.ParseError as error:
        line, column = error.position
        what = str(error).partition(":")[0]
        raise UserError(
            f"{file} is broken XML at line {line}, column {column} ({what}): correct or remove it"
        ) from None
    except UserError as error:
        raise UserError(f"{file} {error}") from None
    except (OSError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise UserError(f"{file} cannot be read ({error}): check the file") from error
    if root.tag != "annotation":
        raise UserError(f"{file} is no Pascal VOC annotation, its root is <{root.tag[:40]}>: remove it from the folder")
    return root


def _number(node: Element, path: str, file: Path, where: str, missing: float | None = None) -> float:
    text = node.findtext(path)
    if (text is None or not text.strip()) and missing is not None:
        return missing
    try:
        return float(text or "")
    except ValueError:
        raise UserError(f"{file}: {where} has no number as {path}; correct it") from None
