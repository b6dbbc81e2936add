"""The results directories that show values of a store: `<store>/results/<sha256 of path>.json`.

Several results directories can share a store, and `clean` must know them all. The workflow
registers its `results`; a step whose `--save-dir` lies in none of those registers that directory
itself. Each file is written once and never changed, so parallel writers need no lock. The paths
are relative to the store, like the links in results: both survive a move of the whole project.
Where the store was is kept as well, because a store that was moved without its project is elsewhere
relative to the results that show it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from llava_steps.core import filesystem
from llava_steps.core.errors import IntegrityError

_NAME = re.compile(r"[0-9a-f]{64}\.json")
FOLDER = "results"
DEPTH = 3
"""Levels of directories below a results directory: results/<run>/<rule>/<share>."""


def register(store: Path, directory: Path) -> None:
    """Register a results directory; nothing is written when it is registered."""
    file = _file(store, directory.resolve())
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        path = _relative(store, directory.resolve())
        filesystem.write_json(file, {"path": path, "store": str(store.resolve())})


def register_result(store: Path, out: Path) -> None:
    """Register `out` unless it lies in a results directory that is registered."""
    if not any(_covers(directory, out.resolve()) for directory in registered(store)):
        register(store, out)


def registered(store: Path) -> list[Path]:
    """All registered directories, whether they exist or not.

    Of a store that was moved: those beside its new location and those beside its old one.
    """
    return [path for _, paths in _entries(store) for path in paths]


def forget(store: Path, directory: Path) -> bool:
    """Remove a directory from the registry; False when it was not registered."""
    names = {directory.resolve(), directory.absolute()}
    files = [file for file, paths in _entries(store) if names & {*paths}]
    for file in files:
        file.unlink()
    return bool(files)


def _entries(store: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each file of the registry, and the directories that it may mean."""
    for file in sorted((store / FOLDER).glob("*.json")):
        if not _NAME.fullmatch(file.name):
            continue
        try:
            entry = json.loads(file.read_bytes())
            stores = dict.fromkeys([store.resolve(), _old_location(store, Path(entry["store"]))])
            paths = [Path(os.path.normpath(each / entry["path"])) for each in stores]
        except FileNotFoundError:
            continue  # forgotten meanwhile
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{file} is damaged: {error!r}; delete it and name its directory with --results"
            ) from None
        yield file, [path for path in paths if path.is_dir()] or paths[:1]


def _old_location(store: Path, recorded: Path) -> Path:
    """Where a store was before it was moved; a copy of a store that still exists was not moved."""
    moved = not recorded.exists() or recorded.resolve() == store.resolve()
    return recorded if moved else store.resolve()


def _relative(store: Path, directory: Path) -> str:
    return os.path.relpath(directory, store.resolve())


def _file(store: Path, directory: Path) -> Path:
    name = filesystem.sha256_json(_relative(store, directory))
    return store / FOLDER / f"{name}.json"


def _covers(directory: Path, out: Path) -> bool:
    return out.is_relative_to(directory) and len(out.relative_to(directory).parts) <= DEPTH
