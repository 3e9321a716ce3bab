"""Reads Pascal VOC XML files as the tables of a COCO file.

The name of an XML file decides which image it belongs to, as in torchvision: <filename> is often stale. Categories have
their names as ids. Objects marked difficult become crowds: as in VOC's evaluation they are neither trained on nor
counted as missed, and their detections do not count as false.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from detr_fabric.data.formats.categories import Categories, category_id
from detr_fabric.data.formats.fields import Content, inside
from detr_fabric.data.formats.files import IMAGE_SUFFIXES, read_text, stem_in, walk
from detr_fabric.errors import UserError

LISTS = Path("ImageSets", "Main")  # where VOC lists the images for training and for validation
CORNERS = ("xmin", "ymin", "xmax", "ymax")
STARTS_AT_ZERO = re.compile(rb"<[xy]min>\s*0+\s*<")


class _Builder(ElementTree.TreeBuilder):
    """Refuses document types: annotations need none, and entities can be bombs."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("declares a document type, which annotations don't need; remove its <!DOCTYPE>")


def read_voc(path: Path, images: Path | None = None, training: Categories | None = None) -> Content:
    """path: a folder of XML files, or a list in ImageSets/Main. images: their folder, to find each by the name of its
    XML file; None: VOC's JPEGImages, or <filename> decides. training: categories whose ids classes of one name get.

    VOC counts pixels from 1, and a box includes its last one. But corners with decimals, as CVAT writes them, are
    coordinates from 0, and so are all others in a folder where some xmin or ymin is 0. Raises UserError naming the file
    and the line or object that is wrong.
    """
    folder, files = (path, list(walk(path, (".xml",)))) if path.is_dir() else _listed(path)
    if images is None and (folder.parent / "JPEGImages").is_dir():
        images = folder.parent / "JPEGImages"
    from_zero = any(STARTS_AT_ZERO.search(_read_bytes(file)) for file in walk(folder, (".xml",)))
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    decimals = 0
    for file in files:
        root = _parse(file)
        image: dict[str, Any] = {"id": stem_in(folder, file), "file_name": (root.findtext("filename") or "").strip()}
        for side in ("width", "height"):
            if pixels := _number(root, f"size/{side}", file, "its image", missing=0):
                image[side] = pixels  # some programs write 0 if they don't know
        rows.append(image)
        for number, node in enumerate(root.findall("object"), 1):
            name = (node.findtext("name") or "").strip()
            if not name:
                raise UserError(f"{file}: object {number} has no name; correct it")
            where = f"object {number} ({name})"
            xmin, ymin, xmax, ymax = (_number(node, f"bndbox/{corner}", file, where) for corner in CORNERS)
            exact = not all((node.findtext(f"bndbox/{corner}") or "").strip().isdigit() for corner in CORNERS)
            decimals += exact
            first, last = (0, 0) if exact or from_zero else (1, 1)
            row = {
                "id": f"{image['id']}.xml {where}",
                "image_id": image["id"],
                "category_id": category_id(name, training),
            }
            box = [xmin - first, ymin - first, xmax - xmin + last, ymax - ymin + last]
            difficult = (node.findtext("difficult") or "").strip() == "1"
            annotations.append(row | {"bbox": box, "iscrowd": int(difficult)})
    if training is not None:
        categories = [{"id": id, "name": name} for id, name in zip(training.ids, training.names, strict=True)]
    else:
        categories = [{"id": name, "name": name} for name in sorted({row["category_id"] for row in annotations})]
    if not categories:
        raise UserError(f"{path}: none of its .xml files has an object, so there are no classes; add annotated images")
    notes = _find_images(rows, images)
    if decimals:
        notes.append(f"{decimals:,} boxes have decimals: their corners are coordinates from 0, not pixels from 1")
    if from_zero:
        notes.append("some xmin or ymin is 0: all corners are coordinates from 0, where VOC counts pixels from 1")
    return Content({"images": rows, "annotations": annotations, "categories": categories}, notes, converted=True)


def _find_images(rows: list[dict[str, Any]], images: Path | None) -> list[str]:
    """Gives each row the file of its image: that with the name of the XML file, else <filename>. Returns notes.

    Raises UserError where several XML files would get one image.
    """
    found = defaultdict(list)  # stem → images
    if images is not None:
        for file in walk(images, IMAGE_SUFFIXES):
            found[stem_in(images, file)].append(file.relative_to(images).as_posix())
    owners: dict[str, str] = {}  # image → stem
    stale = 0
    for row in sorted(rows, key=lambda row: row["id"] not in found):
        stem, named = row["id"], PurePosixPath(row["file_name"].replace("\\", "/"))
        own = found.get(stem, [])
        if own and str(named) not in own:
            if len(own) > 1:
                raise UserError(f"{images}: {', '.join(own)} are all images of {stem}.xml: keep one of them")
            stale += PurePosixPath(stem).name not in (named.stem, named.name) and named.name != ""
            named = PurePosixPath(own[0])
        if inside(row["file_name"]) or own:
            row["file_name"] = str(named)
        if inside(name := row["file_name"]) and owners.setdefault(name, stem) != stem:
            cure = "name the images too, so that the names of the XML files decide"
            if images is not None:
                cure = f"restore the image of {stem}.xml or remove the file"
            raise UserError(f"{stem}.xml and {owners[name]}.xml are both of the image {name}: {cure}")
    return [f"{stale:,} XML files name another image in <filename>: their own names decide"] if stale else []


def _listed(path: Path) -> tuple[Path, list[Path]]:
    """The folder Annotations, two folders above a list, and its XML files that the list names: a name a line, and
    perhaps more behind it."""
    parents = path.absolute().parents
    folder = parents[2] / "Annotations" if len(parents) > 2 else path.parent
    names = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path} names no image: add a name a line")
    for name in names:
        if not inside(name) or not os.path.isfile(folder / f"{name}.xml"):  # Path's raises for overlong names
            raise UserError(f"{path} names {name[:100]!r}, which has no .xml file in {folder}: correct the list")
    return folder, [folder / f"{name}.xml" for name in names]


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check the file") from error


def _parse(file: Path) -> Element:
    try:
        root = ElementTree.fromstring(_read_bytes(file), ElementTree.XMLParser(target=_Builder()))
    except ElementTree.ParseError as error:
        line, column = error.position
        what = str(error).partition(":")[0]
        raise UserError(
            f"{file} is broken XML at line {line}, column {column} ({what}): correct or remove it"
        ) from None
    except UserError as error:
        raise UserError(f"{file} {error}") from None
    except (ValueError, LookupError) as error:  # LookupError: an unknown encoding
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
