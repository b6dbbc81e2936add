"""The results directories that show values of a store: `<store>/results/<sha256 of path>.json`.

Several results directories can share a store, and `clean` must know them all. The workflow
registers its `results`; a step whose `--save-dir` lies in none of those registers that directory
itself. Each file is written once and never changed, so parallel writers need no lock. The paths
are relative to the store, like the links in results: both survive a move of the whole project.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from llava_steps.core import filesystem
from llava_steps.core.errors import IntegrityError

_NAME = re.compile(r"[0-9a-f]{64}\.json")
FOLDER = "results"
DEPTH = 3
"""Levels of directories below a results directory: results/<run>/<rule>/<share>."""


def register(store: Path, directory: Path) -> None:
    """Register a results directory; nothing is written when that was done before."""
    file = _file(store, directory.resolve())
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        filesystem.write_json(file, {"path": _relative(store, directory.resolve())})


def register_result(store: Path, out: Path) -> None:
    """Register `out` unless it lies in a results directory that is registered."""
    if not any(_covers(directory, out.resolve()) for directory in registered(store)):
        register(store, out)


def registered(store: Path) -> list[Path]:
    """All registered directories, whether they exist or not."""
    found = []
    for file in sorted((store / FOLDER).glob("*.json")):
        if not _NAME.fullmatch(file.name):
            continue
        try:
            path = json.loads(file.read_bytes())["path"]
            found.append(Path(os.path.normpath(store.resolve() / path)))
        except FileNotFoundError:
            continue  # forgotten meanwhile
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{file} is damaged: {error!r}; delete it and name its directory with --results"
            ) from None
    return found


def forget(store: Path, directory: Path) -> bool:
    """Remove a directory from the registry; False when it was not registered."""
    files = [_file(store, path) for path in (directory.resolve(), directory.absolute())]
    known = [file for file in dict.fromkeys(files) if file.exists()]
    for file in known:
        file.unlink()
    return bool(known)


def _relative(store: Path, directory: Path) -> str:
    return os.path.relpath(directory, store.resolve())


def _file(store: Path, directory: Path) -> Path:
    name = filesystem.sha256_json(_relative(store, directory))
    return store / FOLDER / f"{name}.json"


def _covers(directory: Path, out: Path) -> bool:
    return out.is_relative_to(directory) and len(out.relative_to(directory).parts) <= DEPTH
