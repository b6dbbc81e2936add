"""The results directories that show values of a store: `<store>/results/<sha256 of path>.json`.

Several results directories can share a store, and `clean` must know them all. The workflow
registers its `results`; a step whose `--save-dir` lies in none of those registers that directory
itself. A file is replaced as a whole, so parallel writers need no lock. The paths are relative to
the store, like the links in results: both survive a move of the whole project. Where the store was
is kept as well, because a store that was moved without its project is elsewhere relative to the
results that show it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from llava_steps.core import filesystem
from llava_steps.core.errors import IntegrityError
from llava_steps.store.shown import shown

_NAME = re.compile(r"[0-9a-f]{64}\.json")
FOLDER = "results"


def register(store: Path, directory: Path) -> None:
    """Register a results directory; nothing is written when it is registered."""
    here, directory = store.resolve(), directory.resolve()
    entry = {"path": os.path.relpath(directory, here), "store": str(here)}
    file = _file(store, entry["path"])
    if file.exists() and _read(file) != entry and not _shows(store, directory):
        # The store was moved, and this directory did not come along: it only has the same name.
        file = _file(store, entry)
    if not file.exists() or _read(file) != entry:
        file.parent.mkdir(parents=True, exist_ok=True)
        filesystem.write_json(file, entry)


def register_result(store: Path, out: Path) -> None:
    """Register `out` unless it lies in a results directory that is registered."""
    if not any(out.resolve().is_relative_to(directory) for directory in registered(store)):
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
    here = store.resolve()
    entries: dict[Path, dict[str, str]] = {}
    for file in sorted((store / FOLDER).glob("*.json")):
        if _NAME.fullmatch(file.name):
            with contextlib.suppress(FileNotFoundError):  # forgotten meanwhile
                entries[file] = _read(file)
    now = {_join(here, entry) for entry in entries.values() if entry["store"] == str(here)}
    for file, entry in entries.items():
        beside, was = _join(here, entry), _join(_old_location(store, Path(entry["store"])), entry)
        if beside == was:
            yield file, [was]
            continue
        # Beside the new location, another directory may have the same name.
        came_along = beside.is_dir() and beside not in now and _shows(store, beside)
        known = was.is_dir() or came_along
        yield file, [path for path in (beside, was) if path.is_dir()] if known else [was]


def _read(file: Path) -> dict[str, str]:
    """The entry in a file of the registry.

    Raises:
        IntegrityError: it is damaged.
    """
    try:
        entry = json.loads(file.read_bytes())
        return {"path": str(entry["path"]), "store": str(entry["store"])}
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{file} is damaged: {error!r}; delete it and name its directory with --results"
        ) from None


def _shows(store: Path, directory: Path) -> bool:
    """Whether a directory shows anything of the store."""
    entries = shown(store, [directory])
    return bool(entries.values or entries.works)


def _join(store: Path, entry: dict[str, str]) -> Path:
    return Path(os.path.normpath(store / entry["path"]))


def _old_location(store: Path, recorded: Path) -> Path:
    """Where a store was before it was moved; a copy of a store that still exists was not moved."""
    moved = not recorded.exists() or recorded.resolve() == store.resolve()
    return recorded if moved else store.resolve()


def _file(store: Path, named: object) -> Path:
    return store / FOLDER / f"{filesystem.sha256_json(named)}.json"
