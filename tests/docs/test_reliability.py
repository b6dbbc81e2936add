"""docs/reliability.md: every promise names tests that exist and run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| (\[[^|]+) \|$", PAGE, flags=re.M))


def test_every_row_is_looked_at() -> None:
    assert len(ROWS) == len(re.findall(r"^\| ", PAGE, flags=re.M)) - 1 >= 20


@pytest.mark.parametrize("what", ROWS)
def test_a_promise_names_tests_that_run(what: str) -> None:
    """A name belongs to the file before it; what a test needs is told."""
    file, named = None, 0
    for path, name in re.findall(r"\]\(\.\./([\w/.]+)\)|`(test_\w+)`", ROWS[what]):
        if path:
            file = ROOT / path
            continue
        assert file is not None, f"{name} stands in no file"
        parts = ast.parse(file.read_text(encoding="utf-8")).body
        (function,) = (p for p in parts if isinstance(p, ast.FunctionDef) and p.name == name)
        for mark in map(ast.unparse, function.decorator_list):
            reason = re.search(r"skipif\(.*reason='([^']+)'\)", mark)
            told = reason and f"({reason[1]})" in ROWS[what]
            assert told or not ("skip" in mark or "xfail" in mark), mark
        named += 1
    assert named
