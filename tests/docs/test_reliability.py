"""docs/reliability.md: every promise names tests that exist and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.named_tests import skips

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| (\[[^|]+) \|$", PAGE, flags=re.M))


def test_every_row_is_looked_at() -> None:
    assert len(ROWS) == len(re.findall(r"^\| ", PAGE, flags=re.M)) - 1 >= 20


@pytest.mark.parametrize("what", ROWS)
def test_a_promise_names_tests_that_run(what: str) -> None:
    """A name belongs to the file before it; what a test needs is told."""
    for _, skipped in skips(ROWS[what]):
        for mark in skipped:
            reason = re.search(r"skipif\(.*reason='([^']+)'\)", mark)
            assert reason and f"({reason[1]})" in ROWS[what], mark
