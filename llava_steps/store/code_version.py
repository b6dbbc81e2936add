"""The code version of a step: a digest of the modules of this package that it can reach.

Comments, docstrings and formatting do not count, so that editing them recomputes nothing; any
other edit of a module that the step imports, directly or not, does. So does an edit of a file
beside such a module that is not one itself (a template, a style sheet).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from pathlib import Path

from llava_steps.core.errors import InputError

PACKAGE = Path(__file__).resolve().parent.parent
NAME = PACKAGE.name
DATA = (".j2", ".css")
"""Endings of files that belong to the code of the modules in their directory."""

NOT_COMPUTING = frozenset(
    f"{NAME}.{module}"
    for module in (
        "core.errors",
        "core.log",
        "geometry.costs",
        "geometry.hardware",
        "geometry.memory",
        "store.code_version",
        "store.digest",
        "store.identity",
        "store.lease",
        "store.registry",
        "store.run",
        "store.shown",
        "store.step",
        "store.store",
        "store.waiting",
    )
)
"""Modules every step shares that decide where and when a value is computed, never which value."""
SETTINGS = f"{NAME}.settings."
COMPUTING_SETTINGS = frozenset(f"{SETTINGS}{module}" for module in ("blend", "load", "steps"))
"""Modules of `settings` that count as code; the classes of the others count by their values."""


def _computes(module: str) -> bool:
    """Whether a change of the module's code can change a value."""
    if module.startswith(SETTINGS):
        return module in COMPUTING_SETTINGS
    return module not in NOT_COMPUTING


def _file_of(module: str) -> Path | None:
    if module.split(".")[0] != NAME:
        spec = importlib.util.find_spec(module)
        return Path(spec.origin) if spec and spec.origin else None
    base = PACKAGE.joinpath(*module.split(".")[1:])
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
    return tree


@functools.cache
def _read(module: str) -> tuple[str, frozenset[str]]:
    """(digest of the module's code, modules of this package that it imports anywhere)."""
    path = _file_of(module)
    if path is None:
        raise InputError(f"module {module} is missing; is the installation complete?")
    tree = ast.parse(path.read_bytes())
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module)
            imported.update(f"{node.module}.{alias.name}" for alias in node.names)
    ours = frozenset(m for m in imported if m.split(".")[0] == NAME and _file_of(m))
    code = ast.dump(_without_docstrings(tree)).encode()
    beside = sorted(p for p in path.parent.iterdir() if p.suffix in DATA and path.parent != PACKAGE)
    parts = [code, *(p.name.encode() + b"\0" + p.read_bytes() for p in beside)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest(), ours


@functools.cache
def modules_of(module: str) -> tuple[str, ...]:
    """All modules of this package that `module` reaches, itself included, sorted."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        if current in seen or not _computes(current):
            continue
        seen.add(current)
        todo.extend(_read(current)[1])
    return tuple(sorted(seen))


@functools.cache
def code_version(module: str) -> str:
    """Hex digest (16 characters) of the code that the step module can reach."""
    lines = [f"{name} {_read(name)[0]}" for name in modules_of(module)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
