"""One browser for the tests of a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.pages import CHROMIUM


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        # Root in a container has no sandbox; the page is our own file without any script.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = play.chromium.launch(executable_path=CHROMIUM, args=options, timeout=600_000)
        yield found
        found.close()
