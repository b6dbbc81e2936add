"""docs/guarantees.md: every promise names what shows it, and every named test exists and runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.docs.named_tests import skips

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
LINES = [line for line in PAGE.splitlines() if re.match(r"\| (?!promise \|)", line)]
ROWS = {line[2:80]: re.split(r"(?<!\\)\|", line)[1:-1] for line in LINES}
TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M)


def test_every_row_is_read() -> None:
    assert len(ROWS) == len(LINES) >= 60
    assert all(len(cells) == 3 for cells in ROWS.values())


@pytest.mark.parametrize("what", ROWS)
def test_a_promise_names_what_shows_it(what: str) -> None:
    """A test file, a make target or a benchmark, and each of them exists."""
    shown = ROWS[what][2]
    files = re.findall(r"\]\(\.\./(tests/[\w/]+\.py)\)", shown)
    targets = re.findall(r"`make ([a-z-]+)`", shown)
    modules = re.findall(r"`python -m ([\w.]+)`", shown)
    assert files or targets or modules
    assert all((ROOT / file).is_file() for file in files) and set(targets) <= set(TARGETS)
    assert all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize("what", [what for what in ROWS if "`test_" in ROWS[what][2]])
def test_a_promise_names_tests_that_run(what: str) -> None:
    """A name belongs to the file before it; the row says what a skipped test needs."""
    shown = ROWS[what][2]
    for _, skipped in skips(shown):
        for mark in skipped:
            reason = re.search(r"skipif\(.*reason='([^']+)'\)", mark)
            assert reason and f"({reason[1]})" in shown, mark
