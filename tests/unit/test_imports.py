"""Rules about the code itself: what `--help` loads, what is never written.

The layers are held by `lint-imports`, a part of `make check`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_steps.settings.steps import modules

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llava_steps"
SOURCES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))
LIGHT = ("core", "settings", "geometry", "store", "pipeline")
"""Rooms without torch: `--help`, plans and the workflow need no other."""
HEAVY = {"torch", "megatron", "transformers", "wandb", "sklearn", "snakemake"}
MEGATRON_OR_ENERGON = re.compile(r"^(conversion|data|launch|model|training)/")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when the file is) for every import of a file."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test):
            inside |= {id(node) for node in ast.walk(block)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            names = [node.module or ""]
            if node.module == "llava_steps":
                names = [f"llava_steps.{alias.name}" for alias in node.names]
        for name in names:
            yield name, id(node) not in inside


def layer(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else ""


@pytest.mark.parametrize("path", [p for p in SOURCES if layer(p) in LIGHT], ids=str)
def test_light_rooms_have_no_heavy_import(path: Path) -> None:
    for name, _ in imports(path):
        assert name.split(".")[0] not in HEAVY, f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in SOURCES if not layer(p)], ids=str)
def test_steps_import_heavy_things_late(path: Path) -> None:
    for name, at_import in imports(path):
        if at_import:
            assert name.split(".")[0] not in HEAVY, f"{path} imports {name} at its top"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_megatron_stays_where_it_belongs(path: Path) -> None:
    if not MEGATRON_OR_ENERGON.match(path.as_posix()):
        for name, _ in imports(path):
            assert name.split(".")[0] != "megatron", f"{path} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_what_is_never_written(path: Path) -> None:
    """No shell, no evaluated text, no code from a model's repository."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "os.system", "os.popen"), f"{path}:{node.lineno}"
        for keyword in node.keywords:
            switched_on = not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            )
            if keyword.arg in ("shell", "trust_remote_code"):
                assert not switched_on, f"{path}:{node.lineno}: {keyword.arg}"
            if keyword.arg == "weights_only":
                assert ast.unparse(keyword.value) == "True", f"{path}:{node.lineno}"


@pytest.mark.parametrize("module", modules())
def test_help_loads_nothing_heavy(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (
        "--save-dir" in result.stdout
        and f"usage: llava-steps {module.rpartition('.')[2]} " in result.stdout
    )
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not loaded & HEAVY
