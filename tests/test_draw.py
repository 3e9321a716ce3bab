"""Boxes and labels on images: inside the picture, legible, in any script, whatever the boxes and sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detr_fabric import draw as drawing
from detr_fabric.draw import Boxes, Picture, class_color, draw, grid, legible
from tests.patching import Patch

PICTURE = Picture(
    torch.zeros(3, 40, 60, dtype=torch.uint8),
    "image 7",
    predicted=Boxes(torch.tensor([[1.0, 2, 30, 20]]), torch.tensor([1]), torch.tensor([0.75])),
    ground_truth=Boxes(torch.tensor([[0.0, 2, 31, 20]]), torch.tensor([0])),
)


def test_a_small_image_is_enlarged_and_its_boxes_with_it() -> None:
    black = torch.zeros(3, 64, 64, dtype=torch.uint8)
    predicted = Boxes(torch.tensor([[10.0, 20, 40, 50]]), torch.tensor([1]), torch.tensor([0.9]))
    canvas = draw(Picture(black, "", predicted), ["a", "b"])
    assert canvas.size == (512, 512)
    assert canvas.getpixel((320, 300)) == class_color(1) == canvas.getpixel((200, 400))  # right and lower edge
    assert canvas.getpixel((200, 300)) == (0, 0, 0)
    assert draw(PICTURE._replace(image=torch.zeros(3, 480, 640, dtype=torch.uint8)), ["a", "b"]).size == (640, 480)


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (480, 640), (30, 900)])
def test_labels_stay_inside_the_picture(size: tuple[int, int], patch: Patch) -> None:
    height, width = size
    spots: list[drawing.Rectangle] = []
    label = drawing._label

    def spy(*args: Any) -> drawing.Rectangle:
        spots.append(label(*args))
        return spots[-1]

    patch(drawing, "_label", spy)
    corners = [[0, 0, 5, 5], [width - 3, height - 3, width, height], [-50, -50, 2 * width, 2 * height], [9, 9, 9, 9]]
    boxes = Boxes(torch.tensor(corners).float(), torch.arange(4), torch.linspace(0, 1, 4))
    canvas = draw(
        Picture(torch.full((3, *size), 128, dtype=torch.uint8), "", boxes, boxes), ["cat", "dog", "person", "x"]
    )
    assert len(spots) == 4
    for left, top, right, bottom in spots:
        assert left >= 0 and top >= 0
        assert right <= max(canvas.width, right - left) and bottom <= max(canvas.height, bottom - top)


def test_true_boxes_are_dashed_and_neither_has_to_be_there() -> None:
    grey = torch.full((3, 512, 512), 128, dtype=torch.uint8)
    true = Boxes(torch.tensor([[100.0, 100, 400, 400]]), torch.tensor([0]))
    canvas = draw(Picture(grey, "", None, true), ["a"])
    edge = {canvas.getpixel((x, 100)) for x in range(120, 380)}
    assert edge == {(0, 0, 0), (255, 255, 255)}
    assert draw(Picture(grey, ""), ["a"]).getcolors() == [(512 * 512, (128, 128, 128))]


def test_class_colors_differ_between_neighbours() -> None:
    colors = [class_color(label) for label in range(91)]
    assert len(set(colors)) == 91
    assert all(
        max(abs(a - b) for a, b in zip(x, y, strict=True)) > 80 for x, y in zip(colors, colors[1:], strict=False)
    )


def test_a_grid_holds_every_picture_above_its_caption() -> None:
    red, wide = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (640, 320), (0, 0, 255))
    sheet = grid([red, wide, red], ["one", "two", "three"], columns=2, cell=128)
    counts = {color: count for count, color in sheet.getcolors(1 << 20) or []}
    assert counts[(255, 0, 0)] == 2 * 128 * 128 and counts[(0, 0, 255)] == 128 * 64
    assert sheet.width < 3 * 128


def test_text_fits_on_a_strip_and_labels_make_room_for_each_other() -> None:
    boxes = Boxes(torch.tensor([[100.0, 10, 400, 50]]), torch.tensor([0]), torch.tensor([0.9]))
    strip = np.asarray(draw(Picture(torch.full((3, 60, 4000), 90, dtype=torch.uint8), "", boxes), ["person"]))
    assert (strip[10:51, 100:401] == 90).all(-1).mean() > 0.1, "the box's inside is to be seen"
    many = Boxes(torch.tensor([[200.0, 200, 300, 300]] * 3), torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.8, 0.7]))
    picture = draw(Picture(torch.zeros(3, 512, 512, dtype=torch.uint8), "", many), ["a", "b", "c"])
    areas = [(np.asarray(picture) == class_color(label)).all(-1).sum() for label in range(3)]
    assert min(areas) > 300, areas


def label_spots(patch: Patch) -> list[drawing.Rectangle]:
    """Where the labels are that are written from now on."""
    spots: list[drawing.Rectangle] = []
    label = drawing._label

    def spy(*args: Any) -> drawing.Rectangle | None:
        if (spot := label(*args)) is not None:
            spots.append(spot)
        return spot

    patch(drawing, "_label", spy)
    return spots


def test_a_label_stands_beside_its_object_where_there_is_room(patch: Patch) -> None:
    spots = label_spots(patch)
    places = [[200.0, 200, 230, 230], [0, 0, 40, 40], [470, 0, 511, 40], [0, 470, 40, 511], [0, 200, 511, 300]]
    for place in places:
        boxes = Boxes(torch.tensor([place]), torch.tensor([0]), torch.tensor([0.5]))
        draw(Picture(torch.zeros(3, 512, 512, dtype=torch.uint8), "", boxes), ["a long name of a class"])
        assert drawing._overlap(spots[-1], tuple(place)) == 0  # type: ignore[arg-type]


def test_lines_lie_around_a_small_object() -> None:
    image = torch.full((3, 2000, 2000), 90, dtype=torch.uint8)
    boxes = Boxes(torch.tensor([[1000.0, 1000, 1010, 1010]]), torch.tensor([0]), torch.tensor([0.5]))
    pixels = np.asarray(draw(Picture(image, "", boxes, boxes), ["a"]))
    assert (pixels[1001:1010, 1001:1010] == 90).all()


def test_a_long_name_is_shortened_to_the_picture(patch: Patch) -> None:
    spots = label_spots(patch)
    boxes = Boxes(torch.tensor([[100.0, 100, 200, 200]]), torch.tensor([0]), torch.tensor([0.5]))
    draw(Picture(torch.zeros(3, 512, 512, dtype=torch.uint8), "", boxes), ["name " * 100])
    assert spots[0][0] >= 0 and spots[0][2] <= 512


def test_text_grows_with_the_picture(patch: Patch) -> None:
    spots = label_spots(patch)
    boxes = Boxes(torch.tensor([[100.0, 100, 200, 200]]), torch.tensor([0]), torch.tensor([0.5]))
    for side in (600, 1200, 4800):
        draw(Picture(torch.zeros(3, side, side, dtype=torch.uint8), "", boxes), ["cat"])
    heights = [bottom - top for _, top, _, bottom in spots]
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.15) and heights[2] == pytest.approx(
        8 * heights[0], rel=0.15
    )


def test_names_in_many_scripts_are_written_and_those_without_a_font_by_their_ids(patch: Patch) -> None:
    names = ["cat", "кошка", "γάτα", "गाय\U0001f9ff", "broken \ud800 name"]
    patch(drawing, "_font_files", lambda: [f"{matplotlib_fonts()}/DejaVuSans.ttf"])
    drawing.font_file.cache_clear()
    assert legible(names, [1, 2, 3, "d", 17]) == ["cat", "кошка", "γάτα", "class d", "class 17"]
    drawing.font_file.cache_clear()


def matplotlib_fonts() -> str:
    import matplotlib

    return f"{matplotlib.get_data_path()}/fonts/ttf"


def test_letters_beyond_latin_are_drawn_as_themselves() -> None:
    def ink(text: str) -> bytes:
        mask = drawing.font(text, 40).getmask(text)
        return bytes(mask)

    assert len({ink(letter) for letter in "жщяΩΣعب"}) == 7, "a missing glyph looks like every other"


@pytest.mark.process
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nothing_that_can_be_in_a_data_set_or_come_from_a_model_fails(data: st.DataObject) -> None:
    side = st.sampled_from([1, 2, 3, 4, 17, 64, 513, 3000])
    height, width = data.draw(side), data.draw(st.sampled_from([1, 2, 64, 200]))
    if data.draw(st.booleans()):
        height, width = width, height
    number = st.floats(width=32) | st.integers(-5, 600).map(float)
    name = st.text(max_size=40) | st.sampled_from(["\ud800x", "a\nb", "", "猫", "\x00", "قطة", "x" * 500])

    def boxes(scored: bool) -> Boxes:
        count = data.draw(st.integers(0, 4))
        corners = data.draw(st.lists(st.lists(number, min_size=4, max_size=4), min_size=count, max_size=count))
        labels = data.draw(st.lists(st.integers(-2, 4), min_size=count, max_size=count))
        scores = data.draw(st.lists(number, min_size=count, max_size=count)) if scored else None
        return Boxes(
            torch.tensor(corners, dtype=torch.float32).view(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            None if scores is None else torch.tensor(scores, dtype=torch.float32),
        )

    caption = data.draw(name)
    picture = Picture(
        torch.zeros(3, height, width, dtype=torch.uint8), caption, boxes(True), boxes(False), boxes(False)
    )
    drawn = draw(picture, data.draw(st.lists(name, max_size=3)), side=data.draw(st.sampled_from([16, 512])))
    assert drawn.width * height == drawn.height * width
    assert grid([drawn, drawn], [caption, "b"], cell=128).height > 0
