"""The report in a real browser: content, contrast, phone and desktop, light and dark.

Needs Chromium, which this test does not install: `apt install chromium` (.ci/run does it as root).
LLAVA_STEPS_SCREENSHOTS names a directory that keeps the pictures, LLAVA_STEPS_REPORT a report.html
that is opened instead of the fixture's.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.browser.pages import CHROMIUM, VIEWS, checked
from tests.helpers import recipe_fixtures
from tests.helpers.chain import run_step
from tests.helpers.report_fixtures import HOSTILE, make_run

pytestmark = pytest.mark.skipif(
    not CHROMIUM,
    reason="NO BROWSER: the report was not looked at; apt install chromium, or run .ci/run as root",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("LLAVA_STEPS_REPORT"):
        return Path(given).resolve()
    root = tmp_path_factory.mktemp("page")
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in make_run(root).items()]
    run_step("report", f"--title=run {HOSTILE[0]}", *flags, "--save-dir=out", cwd=root)
    return root / "out/report.html"


@pytest.mark.parametrize(("width", "scheme"), VIEWS, ids=lambda value: str(value))
def test_the_page_is_whole_readable_and_quiet(
    browser: Any, report: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    with checked(browser, report, tmp_path, width, scheme) as page:
        for name in ("pipeline", "results", "answers", "data", "training", "conversion", "costs"):
            box = page.locator(f"section#{name}").bounding_box()
            assert box is not None and box["width"] > width * 0.8 and box["height"] > 100, name
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert page.evaluate(broken) == 0 and page.evaluate("document.images.length") > 10
        assert page.locator("svg.chart .curve").count() == 8
        inside_boxes(page)
        last_column_is_seen(page, width)


def test_without_scripts_nothing_is_missing(browser: Any, report: Path) -> None:
    """The policy of the page forbids scripts, also those that a text of the data brings along."""
    page = browser.new_page()
    page.goto(report.as_uri())
    assert page.locator("script").count() == 0
    assert "default-src 'none'" in page.locator("meta[http-equiv]").get_attribute("content")
    page.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    run_step("report", *recipe_fixtures.flags(recipe_fixtures.make_recipe(root)),
             "--save-dir=out", cwd=root)  # fmt: skip
    return Path(shutil.copy(root / "out/report.html", root / "recipe.html"))


@pytest.mark.parametrize(("width", "scheme"), VIEWS, ids=lambda value: str(value))
def test_the_page_of_a_recipe_is_whole_readable_and_quiet(
    browser: Any, recipe: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    with checked(browser, recipe, tmp_path, width, scheme) as page:
        assert page.locator("svg.chart .curve").count() == 4 * 2 + 3
        inside_boxes(page)
        last_column_is_seen(page, width)


def inside_boxes(page: Any) -> None:
    """No text of the pipeline touches the edge of its box."""
    for box in page.locator(".pipeline .box").all():
        edge = box.locator("rect").bounding_box()
        for text in box.locator("text").all():
            shown = text.bounding_box()
            right = shown["x"] + shown["width"]
            assert right <= edge["x"] + edge["width"] - 4, text.text_content()


def last_column_is_seen(page: Any, width: int) -> None:
    """The model after the last stage is seen without scrolling inside the table of results."""
    caption = page.locator("#results caption span").first.bounding_box()
    assert caption["x"] >= page.locator("#results .card").first.bounding_box()["x"]
    row = page.locator("#results tbody").first.locator("tr").first
    cell = row.locator("td").last.bounding_box()
    assert cell["x"] >= 0 and cell["x"] + cell["width"] <= width
    name = row.locator("th").bounding_box()
    assert name["x"] >= 0 and name["x"] + name["width"] <= cell["x"]
