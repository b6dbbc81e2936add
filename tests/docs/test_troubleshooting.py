"""docs/how-to/troubleshooting.md: every message that it quotes is one that the code says."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.M)
GAP = "…"


def text(node: ast.AST) -> str:
    """A text as the code writes it; what is filled in is a gap."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else GAP
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    return GAP


@functools.cache
def said() -> list[str]:
    """All texts of the package, those that are put together piece by piece as one."""
    found = []
    for path in (ROOT / "llava_steps").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                found.append(text(node))
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                found.append(text(node.left) + text(node.right))
    return found


def pattern(message: str) -> re.Pattern[str]:
    """Gaps of the page match what is filled in, or anything."""
    return re.compile(".*".join(map(re.escape, message.split(GAP))), flags=re.S)


@pytest.mark.parametrize("message", QUOTED)
def test_the_code_says_so(message: str) -> None:
    assert len(message.replace(GAP, "").strip()) >= 10, "too little to look for"
    wanted = pattern(message)
    assert any(wanted.search(one) for one in said() if len(one) < 1000), message


def test_there_is_something_for_each_kind_of_mistake() -> None:
    assert len(QUOTED) > 45 and len(set(QUOTED)) == len(QUOTED)
    assert not any(pattern("a message that … nobody").search(one) for one in said())
