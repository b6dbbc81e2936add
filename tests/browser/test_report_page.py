"""The report in a real browser: content, contrast, phone and desktop, light and dark.

Needs Chromium, which this test does not install: `apt install chromium` (.ci/run does it as root).
LLAVA_STEPS_SCREENSHOTS names a directory that keeps the pictures, LLAVA_STEPS_REPORT a report.html
to look at instead of the fixture's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.chain import run_step
from tests.helpers.report_fixtures import HOSTILE, make_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(
    not CHROMIUM,
    reason="NO BROWSER: the report was not looked at; apt install chromium, or run .ci/run as root",
)
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("LLAVA_STEPS_REPORT"):
        return Path(given).resolve()
    root = tmp_path_factory.mktemp("page")
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in make_run(root).items()]
    run_step("report", f"--title=run {HOSTILE[0]}", *flags, "--save-dir=out", cwd=root)
    return root / "out/report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        # Root in a container has no sandbox; the page is our own file without any script.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = play.chromium.launch(executable_path=CHROMIUM, args=options, timeout=600_000)
        yield found
        found.close()


@pytest.mark.parametrize(("width", "scheme"), VIEWS, ids=lambda value: str(value))
def test_the_page_is_whole_readable_and_quiet(
    browser: Any, report: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    said: list[str] = []
    asked: list[str] = []
    # The rules of axe are a script, which the page's own policy would refuse.
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, bypass_csp=True
    )
    context.set_default_timeout(600_000)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    picture = tmp_path / f"report-{width}-{scheme}.png"
    page.screenshot(path=picture, full_page=True)
    if kept := os.environ.get("LLAVA_STEPS_SCREENSHOTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, kept)

    assert said == [], "console errors, warnings or exceptions"
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}, "no network"
    assert "taken" not in page.title().replace(HOSTILE[0], ""), "a text of the data was run"
    sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1], "the page scrolls sideways"
    for name in ("pipeline", "results", "answers", "data", "training", "conversion", "costs"):
        box = page.locator(f"section#{name}").bounding_box()
        assert box is not None and box["width"] > width * 0.8 and box["height"] > 100, name
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert page.evaluate(broken) == 0 and page.evaluate("document.images.length") > 10
    assert page.locator("svg.chart .curve").count() == 8

    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]})
    seen = [
        (rule["id"], node["html"][:200], node.get("failureSummary", "")[:300])
        for rule in found.response["violations"]
        for node in rule["nodes"]
    ]
    assert seen == [], seen
    passed = {rule["id"] for rule in found.response["passes"]}
    assert {"color-contrast", "image-alt", "heading-order", "document-title"} <= passed
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1], "an opened part scrolls sideways"

    with Image.open(picture) as shot:
        corner = shot.convert("L").getpixel((5, 5))
    assert (corner > 200) == (scheme == "light") and (corner < 60) == (scheme == "dark")
    context.close()


def test_without_scripts_nothing_is_missing(browser: Any, report: Path) -> None:
    """The policy of the page forbids scripts, also those that a text of the data brings along."""
    page = browser.new_page()
    page.goto(report.as_uri())
    assert page.locator("script").count() == 0
    assert "default-src 'none'" in page.locator("meta[http-equiv]").get_attribute("content")
    page.close()
