"""Fuzzed files: training and the check agree about every one, and the copy is accepted."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detr_fabric.check.repair import Finding, repair
from detr_fabric.check.report import check
from detr_fabric.check.settings import CheckSettings
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.formats.categories import Categories
from detr_fabric.errors import UserError
from tests.coco_files import coco, image, thing, write_json

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 6),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([2**62, 2**63, -(2**63), 10**400, 1.0, 40, 30.0, 1e9, 1e300, float("nan"), float("-inf")]),
    st.sampled_from(["1", "2", "a.png", "../a", "/a", "c:a", "a\\..\\b", "\ud800", "\0", "cat", "dog", "a" * 5000]),
    st.sampled_from([[], {}, [1, 2, 3, 4], [0, 0, 0, 0], [1, 2, "3", 4], [39.9999999, 1, 1e-9, 5], [[1]], {"id": 1}]),
    st.lists(st.one_of(st.integers(-50, 50), st.floats(-60, 60), st.floats()), min_size=4, max_size=4),
).map(copy.deepcopy)  # lists and objects are changed later

KEYS = ["id", "file_name", "width", "height", "image_id", "category_id", "bbox", "area", "iscrowd", "name"]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A data set in which a few entries, keys or tables were changed, repeated, mixed up or removed."""
    content: Any = coco(
        [image(n) for n in range(1, 5)],
        [thing(n, 1 + n % 4, (n, 5, 20, 10), 1 + n % 2) for n in range(1, 9)],
        [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}],
    )
    for row in content["annotations"]:
        row["bbox"] = list(row["bbox"])
    for _ in range(draw(st.integers(0, 8))):
        name = draw(st.sampled_from(["images", "annotations", "annotations", "annotations", "categories"]))
        table = content[name]
        if not isinstance(table, list) or not table:
            continue
        row = draw(st.integers(0, len(table) - 1))
        action = draw(
            st.sampled_from(["set"] * 6 + ["key", "remove", "repeat", "repeat", "replace", "drop", "strings", "table"])
        )
        entry = table[row]
        if action == "table" and draw(st.integers(0, 9)) == 0:
            content[name] = draw(VALUES)
        elif action == "repeat":
            table.insert(draw(st.integers(0, len(table))), copy.deepcopy(entry))
        elif action == "drop":
            del table[row]
        elif action == "replace":
            table[row] = draw(VALUES)
        elif action == "strings":  # all ids of a table, as some tools write them
            for other in table:
                if isinstance(other, dict):
                    other["id"] = str(other.get("id"))[:40]
        elif isinstance(entry, dict) and entry:
            key = draw(st.sampled_from(KEYS if action == "key" else sorted(entry)))
            if action == "remove":
                entry.pop(key, None)
            else:
                entry[key] = draw(VALUES)
    return content


def is_id(id: Any) -> bool:
    return (type(id) is int and -(2**63) < id < 2**63) or (type(id) is str and "\0" not in id)


def own_ids(rows: list[Any], keys: tuple[str, ...]) -> list[bool]:
    """Whether each row has all keys and a proper id, of the more frequent kind, that no earlier row had."""
    whole = [isinstance(row, dict) and all(key in row for key in keys) for row in rows]
    proper = [ok and is_id(row["id"]) for row, ok in zip(rows, whole, strict=True)]
    strings = sum(type(row["id"]) is str for row, ok in zip(rows, proper, strict=True) if ok)
    kind = str if strings > sum(proper) - strings else int
    seen: set[Any] = set()
    result = []
    for row, ok in zip(rows, proper, strict=True):
        result.append(ok and type(row["id"]) is kind and row["id"] not in seen)
        if result[-1]:
            seen.add(row["id"])
    return result


def is_number(value: Any, limit: float) -> bool:
    return type(value) in (int, float) and abs(value) < limit


def known_side(value: Any) -> float:
    return value if is_number(value, 1e9) and value >= 1 and value == int(value) else 1e9


def survivors(content: dict[str, Any], training: Categories | None, coco91: bool) -> list[int] | None:
    """Which annotations the copy keeps; None if there is no copy."""
    tables = [content.get(name) for name in ("images", "categories", "annotations")]
    if not all(isinstance(table, list) for table in tables):
        return None
    images, categories, things = tables
    sizes = {}
    for row, own in zip(images, own_ids(images, ("id", "file_name")), strict=True):
        name = row["file_name"] if own else None
        bad = not isinstance(name, str) or not 0 < len(name) < 4096 or name[0] in "/\\" or name[1:2] == ":"
        if not bad and ".." not in name.replace("\\", "/").split("/") and not {"\0", "\ud800"} & set(name):
            sizes[row["id"]] = known_side(row.get("width")), known_side(row.get("height"))
    names, refused = {}, set()
    for row, own in zip(categories, own_ids(categories, ("id", "name")), strict=True):
        if not own:
            continue
        name = row["name"] if isinstance(row["name"], str) else json.dumps(row["name"])
        wanted = dict(zip(training.ids, training.names, strict=True)).get(row["id"], name) if training else name
        if name != wanted:
            refused.add(row["id"])
        elif training or not coco91 or (type(row["id"]) is int and 0 < row["id"] < 91):
            names[row["id"]] = name
    if not sizes or not names:
        return None
    known = set(training.ids) - refused if training else set(names)
    whole = [isinstance(row, dict) and {"image_id", "category_id", "bbox"} <= set(row) for row in things]
    first = own_ids([row if ok else None for row, ok in zip(things, whole, strict=True)], ("id",))
    kept = []
    for number, row in enumerate(things):
        if not whole[number] or not all(is_id(row[key]) for key in ("image_id", "category_id")):
            continue
        earlier = [things[n] for n in range(number) if first[n] and things[n]["id"] == row.get("id")]
        if not first[number] and is_id(row.get("id")) and row in earlier:
            continue
        if row["image_id"] not in sizes or row["category_id"] not in known:
            continue
        box = row["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(is_number(value, 1e9) for value in box):
            continue
        x, y, w, h = map(np.float32, box)
        right, bottom = (np.float32(limit) for limit in sizes[row["image_id"]])
        if np.clip(x + w, 0, right) > np.clip(x, 0, right) and np.clip(y + h, 0, bottom) > np.clip(y, 0, bottom):
            kept.append(number)
    return kept


TRAINING = Categories((1, 2, 3), ("cat", "dog", "bird"))


@pytest.mark.process
@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutated(), st.sampled_from(["contiguous", "contiguous", "coco91", "validation"]))
def test_any_file_is_accounted_for_and_its_copy_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any], use: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    source, out, training_file = folder / "in.json", folder / "out.json", folder / "train.json"
    write_json(source, content)
    if not training_file.exists():
        names = zip(TRAINING.ids, TRAINING.names, strict=True)
        write_json(training_file, coco(None, [], [{"id": id, "name": name} for id, name in names]))
    out.unlink(missing_ok=True)
    before = source.read_bytes()
    content = json.loads(before)
    training, label_space = (TRAINING, "contiguous") if use == "validation" else (None, use)

    options = {"label_space": label_space, "show": 0}
    if training is not None:
        options["train_annotations"] = str(training_file)
    with contextlib.redirect_stdout(io.StringIO()) as report:
        accepted = check(CheckSettings(str(source), **options))
        mended = check(CheckSettings(str(source), fix=str(out), **options))
    report.getvalue().encode()
    assert source.read_bytes() == before
    try:
        annotations = read_annotations(source, training, label_space)
        if training is None:
            annotations.require_objects(source)
        assert accepted, "training accepts what the check refuses"
    except UserError:
        assert not accepted, "training refuses what the check accepts"

    things = content["annotations"]
    expected = survivors(content, training, use == "coco91") or []
    assert mended == out.exists() == any(things[number].get("iscrowd") != 1 for number in expected)
    if not out.exists():
        return
    found = read_annotations(out, training, label_space)
    rows = {}  # image id → boxes with categories, in the file's order
    for number in expected:
        row = things[number]
        rows.setdefault(row["image_id"], []).append((row["category_id"], *map(float, row["bbox"])))
    for index, id in enumerate(found.image_ids.tolist()):
        part = found.objects(index)
        categories = [found.categories.id(label) for label in found.labels[part]]
        ours = [(category, *box) for category, box in zip(categories, found.boxes[part].tolist(), strict=True)]
        assert ours == rows.pop(id, [])
    assert not rows and found.dropped == 0

    repaired = repair(content, training, label_space)
    assert repaired.rows["annotations"] == (len(things), len(expected))
    listed = Counter(entry for finding in dropping(repaired.findings) for entry in finding.entries)
    for number in set(range(len(things))) - set(expected):
        has_id = isinstance(things[number], dict) and "id" in things[number]
        name = ascii(things[number]["id"]) if has_id else f"number {number}"
        assert listed[name if len(name) <= 40 else name[:37] + "..."] > 0, "an annotation was dropped in silence"
    with contextlib.redirect_stdout(io.StringIO()):
        assert check(CheckSettings(str(out), **options)), "the copy's own check"


def dropping(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.what.startswith("annotations") and finding.copy == "drops"]
