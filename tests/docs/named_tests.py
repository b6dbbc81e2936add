"""Tests that a page of the docs names: ](../FILE), then `NAME` of each test in that file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def skips(text: str) -> list[tuple[str, list[str]]]:
    """(name, decorators that may keep it from running) of each test that `text` names.

    AssertionError when a name stands in no file, or names no test function there, or there is none.
    """
    file, found = None, []
    for path, name in re.findall(r"\]\(\.\./([\w/.]+)\)|`(test_\w+)`", text):
        if path:
            file = ROOT / path
            continue
        assert file is not None, f"{name} stands in no file"
        parts = ast.parse(file.read_text(encoding="utf-8")).body
        functions = [p for p in parts if isinstance(p, ast.FunctionDef) and p.name == name]
        assert len(functions) == 1, f"{name} in {file}"
        marks = map(ast.unparse, functions[0].decorator_list)
        found.append((name, [mark for mark in marks if "skip" in mark or "xfail" in mark]))
    assert found
    return found
