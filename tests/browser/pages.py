"""What holds for every page of a run: quiet, readable, no request, not wider than the window.

Needs Chromium, which the tests do not install: `apt install chromium` (.ci/run does it as root).
LLAVA_STEPS_SCREENSHOTS names a directory that keeps the pictures.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers.report_fixtures import HOSTILE

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@contextlib.contextmanager
def checked(browser: Any, file: Path, tmp_path: Path, width: int, scheme: str) -> Iterator[Any]:
    """An open page; afterwards the accessibility of all its parts is checked, opened ones too."""
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
    page.goto(file.as_uri())
    picture = tmp_path / f"{file.stem}-{width}-{scheme}.png"
    page.screenshot(path=picture, full_page=True)
    if kept := os.environ.get("LLAVA_STEPS_SCREENSHOTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, kept)

    assert said == [], "console errors, warnings or exceptions"
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}, "no network"
    assert "taken" not in page.title().replace(HOSTILE[0], ""), "a text of the data was run"
    assert page.locator("script").count() == 0
    sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1], "the page scrolls sideways"
    yield page

    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]})
    seen = [
        (rule["id"], node["html"][:200], node.get("failureSummary", "")[:300])
        for rule in found.response["violations"]
        for node in rule["nodes"]
    ]
    assert seen == [], seen
    passed = {rule["id"] for rule in found.response["passes"]}
    assert {"color-contrast", "heading-order", "document-title"} <= passed
    assert "image-alt" in passed or not page.evaluate("document.images.length")
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1], "an opened part scrolls sideways"

    with Image.open(picture) as shot:
        corner = shot.convert("L").getpixel((5, 5))
    assert (corner > 200) == (scheme == "light") and (corner < 60) == (scheme == "dark")
    context.close()
