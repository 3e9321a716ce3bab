"""The page in a real browser: Chromium without a window, driven by Playwright."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from detr_fabric.report.collect import collect
from detr_fabric.report.explore import explore
from detr_fabric.report.page import write_page
from detr_fabric.report.records import read_run
from detr_fabric.report.runs import find_runs
from detr_fabric.report.settings import Settings
from tests.report.test_maps import decoded

pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

pytestmark = pytest.mark.process
HOSTILE = "</script><img src=x onerror=alert(1)><b>&amp;"
WAIT = 100_000  # milliseconds, for what comes in one
expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    file = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if file is None:
        pytest.skip("no Chromium here: install it (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=file, args=sandbox, timeout=WAIT)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def content(two_runs: list[Path]) -> dict[str, Any]:
    """The page's data of two runs, whose first class has a hostile name."""
    named = tuple(map(str, two_runs))
    runs = find_runs(named)
    made = collect([read_run(run) for run in runs])
    made |= explore(runs, Settings(named, images=2, worst=1, threshold=0.0))
    made["classes"][0]["name"] = made["runs"][1]["name"] = HOSTILE
    by_class = made["figures"][0]["F1_class"]
    by_class[HOSTILE] = by_class.pop("cat")
    for run in made["explorer"]["runs"]:
        for image in run["images"]:
            image["names"][0] = HOSTILE
    return made


@pytest.fixture(scope="module")
def file(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, {key: value for key, value in content.items() if key not in ("rows", "configs")})
    return path


@pytest.fixture
def page(chromium: Browser, file: Path) -> Iterator[Page]:
    """The page, opened; fails at the end if anything was asked of the network or said on the console."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith(("http", "ws")) else None)
    page.goto(file.as_uri())
    page.wait_for_selector("#stage figure")
    yield page
    context.close()
    assert said == []


def test_it_shows_runs_settings_curves_and_classes(page: Page) -> None:
    assert page.locator("#runs-table tbody tr").count() == 2
    assert page.locator("#runs-table tbody tr").first.inner_text().split()[:3] == ["softmax", "softmax", "25.0"]
    rows = page.locator("#settings-table tbody tr").all_inner_texts()
    assert [row.split() for row in rows] == [["attn.kind", "softmax", "sparsemax"], ["attn.softmax_first", "0", "0.5"]]
    charts = page.locator(".card canvas").count()
    assert charts >= 6
    page.select_option("#unit", "hours")
    page.check("#layers")
    page.check("#log")
    assert page.locator(".card canvas").count() == charts
    assert page.locator(".confusion").count() == 2 and "nothing there" in page.locator(".confusion").first.inner_text()
    page.locator("#classes-table th button").first.click()
    names = page.locator("#classes-table tbody td:first-child").all_inner_texts()
    assert names == sorted(names) and len(names) == 2


def test_classes_show_best_f1_errors_and_calibration_of_the_last_evaluation(page: Page) -> None:
    def shown() -> list[list[str]]:
        return [row.split("\t") for row in page.locator("#classes-table tbody tr").all_inner_texts()]

    assert shown() == [[HOSTILE, "50.0", "50.0"], ["dog", "0.0", "0.0"]]
    page.select_option("#measure", "threshold")
    assert shown() == [[HOSTILE, "0.375", "–"], ["dog", "0.063", "–"], ["all, at one score", "0.250", "–"]]
    page.select_option("#measure", "f1")
    assert shown()[2] == ["all, at one score", "50.0", "–"]
    errors = [row.split("\t") for row in page.locator("#errors-table tbody tr").all_inner_texts()]
    assert errors[0] == ["localisation", "12.5 5", "–"] and errors[5:] == [
        ["missed objects", "50.0 6", "–"],
        ["near-identical pairs", "3 in 12", "–"],
        ["calibration error", "12.5", "–"],
    ]
    dots = page.locator(".calibration circle title").all_text_contents()
    assert len(dots) == 5 and dots[2] == "softmax: mean score 0.450, right 0.400 of 9 detections"
    assert "softmax at step 30." in page.locator("#errors .note").first.inner_text()


def test_values_under_the_pointer_are_those_of_the_log(page: Page) -> None:
    box = page.locator(".card", has_text="GIoU").count()  # its charts have no value in this log
    assert box == 0
    over = page.locator(".card:has(h3:text-is('Loss')) .u-over")
    over.scroll_into_view_if_needed()
    frame = over.bounding_box()
    assert frame is not None
    page.mouse.move(frame["x"] + frame["width"] * 0.65, frame["y"] + 50)  # of steps 0 to 30
    values = page.locator(".card:has(h3:text-is('Loss')) .readout").inner_text()
    assert page.evaluate("[plots[0].plot.scales.x.min, plots[0].plot.scales.x.max]") == [0, 30]
    assert values.startswith("step 20:") and "training 0.5" in re.sub(r"\s+", " ", values)


def test_dragging_over_a_chart_zooms_all_of_them(page: Page) -> None:
    frame = page.locator(".card .u-over").first.bounding_box()
    assert frame is not None
    page.mouse.move(frame["x"] + frame["width"] / 3, frame["y"] + 50)
    page.mouse.down()
    page.mouse.move(frame["x"] + frame["width"] * 2 / 3, frame["y"] + 50, steps=3)
    page.mouse.up()
    ranges = page.evaluate("plots.filter(({plot}) => plot).map(({plot}) => [plot.scales.x.min, plot.scales.x.max])")
    assert len(ranges) > 3 and all(each == pytest.approx([10, 20], abs=0.3) for each in ranges)
    page.click("#unzoom")
    assert page.evaluate("plots[2].plot.scales.x.max") == 30


def test_a_click_on_a_detection_shows_what_its_query_read_as_the_checkpoint_computes_it(
    page: Page, content: dict[str, Any]
) -> None:
    for run in (0, 1):
        shown = content["explorer"]["runs"][run]["images"][0]
        rows, cells = len(shown["queries"]), shown["grid"][0] * shown["grid"][1]
        weights, numbers = decoded(shown["blocks"]["cross/1/mean"], rows, cells)
        for query in shown["queries"][:3]:
            column = page.locator(f".column[data-run='{run}']")
            column.locator(f".hit[data-query='{query}']").press("Enter")  # boxes lie on each other: not by the mouse
            row = shown["queries"].index(query)
            title = page.locator(f".column[data-run='{run}'] figcaption b")
            expect(title).to_have_text(f"{shown['names'][row]} {shown['scores'][row]:.2f} · query {query}")
            column = page.locator(f".column[data-run='{run}']")
            keys = column.locator("[data-number='keys'] dd").inner_text()
            assert keys == f"{numbers[row, 1]:g} of {cells}"
            assert column.locator(".cells rect").count() == (weights[row] > 0).sum() == numbers[row, 1]
            largest = float(column.locator("[data-number='largest'] dd").inner_text())
            assert largest == pytest.approx(numbers[row, 0], rel=1e-3)
            inside = float(column.locator("[data-number='in its box'] dd").inner_text().removesuffix(" %"))
            assert inside == pytest.approx(100 * numbers[row, 4], abs=0.06)


def test_the_mouse_chooses_the_box_under_it_and_a_place_beside_the_boxes(page: Page) -> None:
    hit = page.locator(".column[data-run='0'] .hit").last  # the smallest, on top
    query = hit.get_attribute("data-query")
    hit.click()
    expect(page.locator(".column[data-run='0'] figcaption b")).to_contain_text(f"query {query}")
    page.click("#view-place")
    before = page.locator(".column[data-run='1'] .cells").last.inner_html()
    page.locator(".column[data-run='0'] .picker").click(position={"x": 4, "y": 4})
    expect(page.locator(".column[data-run='1'] figcaption b")).to_have_text("place 1")
    assert page.locator(".column[data-run='1'] .cells").last.inner_html() != before
    assert page.locator(".column[data-run='1'] [data-number='in its box']").count() == 0


def test_keys_change_layer_head_run_and_image_and_a_link_brings_back_the_same_view(page: Page) -> None:
    page.focus("#explorer")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "2", "]"):
        page.keyboard.press(key)
    expect(page.locator("#layer")).to_have_value("0")
    expect(page.locator("#head")).to_have_value("1")
    expect(page.locator(".column.active")).to_have_attribute("data-run", "1")
    page.check("#own")
    view, link = page.locator("#stage").inner_html(), page.url
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector("#stage figure")
    expect(page.locator("#head")).to_have_value("1")
    assert page.locator("#stage").inner_html() == view and page.is_checked("#own")


def test_figures_are_saved_as_svg_and_png(page: Page, tmp_path: Path) -> None:
    for view, pictures in (("all", 2), ("points", 6)):
        page.click(f"#view-{view}")
        if view == "points":
            page.locator(".picker").first.click(position={"x": 30, "y": 30})
            expect(page.locator(".column[data-run='0'] figure")).to_have_count(2)
        for kind in ("svg", "png"):
            with page.expect_download() as waiting:
                page.click(f"#save-{kind}")
            waiting.value.save_as(tmp_path / f"{view}.{kind}")
        drawn = ElementTree.parse(tmp_path / f"{view}.svg").getroot()
        images = drawn.findall(".//{http://www.w3.org/2000/svg}image")
        assert len(images) == pictures and all(i.attrib["href"].startswith("data:image/") for i in images)
        with Image.open(tmp_path / f"{view}.png") as image:
            assert image.size == (2 * int(drawn.attrib["width"]), 2 * int(drawn.attrib["height"]))
            assert len(image.convert("RGB").getcolors(2**24) or []) > 50  # neither empty nor one colour


def test_hostile_names_stay_text(page: Page) -> None:
    assert page.locator("#runs-table tbody tr").nth(1).inner_text().startswith(HOSTILE)
    assert HOSTILE in page.locator("#classes-table").inner_text()
    assert page.locator("#stage figcaption b").first.inner_text().startswith(HOSTILE)
    assert HOSTILE in page.locator("#queries").inner_text()
    assert page.locator("img[src='x']").count() == 0 and page.locator("#stage b b").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(chromium: Browser, file: Path, theme: Any) -> None:
    page = chromium.new_page(viewport={"width": 390, "height": 844}, color_scheme=theme)
    page.set_default_timeout(WAIT)
    page.goto(file.as_uri())
    page.wait_for_selector("#stage figure")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")  # rgb(21, 22, 24)
    dark = sum(map(int, re.findall(r"\d+", color))) < 200
    assert dark == (theme == "dark")
    page.close()
