"""Which entries of a store results directories show."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llava_steps.store.store import MANIFEST

LONGEST_CHAIN = 40
"""Links that are followed one after the other, as in Linux."""
Key = tuple[str, str]
"""An entry by the names of its step and of its directory."""


@dataclass
class Shown:
    """What links and manifests below results directories lead to."""

    values: set[Key] = field(default_factory=set)
    """By a link to a part of the payload, or by a manifest."""
    works: set[Key] = field(default_factory=set)
    """By a link to the entry itself, as an unfinished one is shown."""


def shown(store: Path, directories: Iterable[Path], without: Collection[Path] = ()) -> Shown:
    """What `directories` show of `store`; links are followed, also through other links.

    Directories in `without` and what is below them do not count.

    Raises:
        OSError: a directory cannot be read, so what it shows is not known.
    """
    result, root = Shown(), store.resolve()
    hidden = [path.resolve() for path in without]
    left_out = {root, *hidden}
    for directory in directories:
        if any(directory.resolve().is_relative_to(path) for path in hidden):
            continue
        for path in _files(directory.resolve(), left_out):
            if path.is_symlink():
                for key, whole in targets(root, path):
                    (result.works if whole else result.values).add(key)
            elif path.name == MANIFEST and (named := _named(path)):
                result.values.add(named)
    return result


def targets(root: Path, link: Path) -> Iterator[tuple[Key, bool]]:
    """The entries of the resolved store `root` that `link` leads to; whether to a whole entry.

    Every step of a chain counts, because a payload may itself be a link.
    """
    depths: dict[Key, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for path in _passed(link):
            inside = path.relative_to(root).parts if path.is_relative_to(root) else ()
            if len(inside) >= 2:
                key = inside[0], inside[1]
                depths[key] = max(len(inside), depths.get(key, 0))
    for key, depth in depths.items():
        yield key, depth == 2


def _passed(link: Path) -> Iterator[Path]:
    """Each path, free of links above it, on the way from a link to its end."""
    here, rest, links = Path(os.path.realpath(link.parent)), [link.name], 0
    while rest and links < LONGEST_CHAIN:
        name = rest.pop()
        if name == "..":
            here = here.parent
            continue
        here = here / name
        yield here
        if here.is_symlink():
            links += 1
            target = Path(os.readlink(here))
            here = Path("/") if target.is_absolute() else here.parent
            rest += reversed(target.parts[target.is_absolute() :])


def _files(directory: Path, left_out: Collection[Path]) -> Iterator[Path]:
    """Links and files below a directory, but for the directories that are left out."""
    if directory in left_out:
        return
    try:
        items = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return  # a run removed it meanwhile
    for item in items:
        if item.is_dir() and not item.is_symlink():
            yield from _files(item, left_out)
        else:
            yield item


def _named(manifest: Path) -> Key | None:
    """The entry that a copy of a manifest names; None for a manifest of some other tool."""
    try:
        content = json.loads(manifest.read_bytes())
        return str(content["step"]), str(content["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
