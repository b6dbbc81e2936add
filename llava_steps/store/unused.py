"""What in a store nothing needs, and how to remove it while steps run.

Needed is what a results directory shows, what a live lease holds, and what these read from other
entries. All else is listed with the reason why it can go.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llava_steps.core import filesystem
from llava_steps.core.errors import LockedError
from llava_steps.core.format import duration
from llava_steps.store import lease
from llava_steps.store.digest import CACHE
from llava_steps.store.registry import registered
from llava_steps.store.shown import Key, Shown, targets
from llava_steps.store.store import MANIFEST, READS, REMOVED, WORK, removed_name

YOUNG = 24 * 3600.0
"""Seconds after its last change during which unfinished work stays."""
_ENTRY = re.compile(r"[0-9a-f]{32}(\.replaced-\d+)?")


@dataclass(frozen=True)
class Unused:
    """Something that can be removed."""

    path: Path
    kind: str
    """`value`, `replaced`, `unfinished`, `temporary` or `leftover`."""
    why: str
    size: int = 0
    """Bytes that are free once everything listed with it is removed."""

    @property
    def is_entry(self) -> bool:
        """Whether steps may want it, so that it is only removed under its lease."""
        return self.kind in ("value", "replaced", "unfinished")


def find(
    store: Path, shown: Shown, unfinished: bool = False, ours: Collection[Path] = ()
) -> list[Unused]:
    """All that nothing needs, in a fixed order.

    Args:
        store: the store.
        shown: what results directories show.
        unfinished: also young unfinished work, and work that a run shows and would resume.
        ours: entries whose lease the caller took because an earlier search listed them.
    """
    root = store.resolve()
    entries = dict(_entries(root))
    judged = {
        key: None if path not in ours and lease.alive(path / WORK)
        else _judge(key, path, shown, unfinished, path in ours)
        for key, path in entries.items()
    }  # fmt: skip
    needed = [key for key, item in judged.items() if item is None]
    for key in needed:  # grows: what a needed entry reads is needed too
        for other in _reads(root, entries[key]):
            if judged.get(other) is not None:
                judged[other] = None
                needed.append(other)
    items = [item for item in judged.values() if item is not None]
    for key in needed:
        items += _leftovers(entries[key])
    return _measured(sorted([*items, *_temporaries(root, unfinished)], key=lambda i: i.path))


def remove(
    items: Iterable[Unused], again: Callable[[Collection[Path]], Iterable[Unused]]
) -> list[Unused]:
    """Remove what is still unused once the leases are taken; returns it.

    An entry gets a temporary name under its lease, so a process that is killed while it deletes
    leaves nothing that looks like a value. `again` searches again, given the
    entries whose lease this process holds.
    """
    doomed = []
    with contextlib.ExitStack() as leases:
        held: dict[Path, lease.Lease] = {}
        for item in items:
            if item.is_entry:
                with contextlib.suppress(LockedError, FileNotFoundError):
                    (item.path / WORK).mkdir(exist_ok=True)
                    held[item.path] = leases.enter_context(lease.Lease(item.path / WORK))
        still = {item.path for item in again(held)}
        chosen = [i for i in items if i.path in still and (not i.is_entry or i.path in held)]
        for item in chosen:
            if item.is_entry:
                path = removed_name(item.path)
                if not held[item.path].rename(item.path, path):
                    continue  # forced meanwhile: a new entry has its name
            else:
                path = item.path
            doomed.append((item, path))
    for _, path in doomed:
        with contextlib.suppress(FileNotFoundError):  # another `clean` removes it too
            filesystem.remove(path)
    return [item for item, _ in doomed]


def is_store(root: Path) -> bool:
    """Whether steps have kept values in this directory."""
    return (root / CACHE).exists() or bool(registered(root)) or any(_entries(root))


def _entries(root: Path) -> Iterator[tuple[Key, Path]]:
    """Entries and replaced values. Links do not count: what they lead to is not in the store."""
    for step in _folders(root):
        for path in _folders(step):
            if _ENTRY.fullmatch(path.name):
                yield (step.name, path.name), path


def _folders(directory: Path) -> list[Path]:
    return [p for p in sorted(directory.iterdir()) if p.is_dir() and not p.is_symlink()]


def _judge(key: Key, path: Path, shown: Shown, unfinished: bool, ours: bool) -> Unused | None:
    """Why an entry can go; None when something needs it. Its lease is free, or the caller's."""
    if key in shown.values:
        return None
    fingerprint, replaced, _ = path.name.partition(".")
    if replaced:
        new = path.with_name(fingerprint)
        if key in shown.works or (new.exists() and not (new / MANIFEST).exists()):
            return None  # the only complete value until the new one is sealed
        return Unused(path, "replaced", "computed again with --force")
    if (path / MANIFEST).exists():
        return None if key in shown.works else Unused(path, "value", "no run shows it")
    age = time.time() - _newest(path)
    if not unfinished and (key in shown.works or (age < YOUNG and not ours)):
        return None
    run = "a run shows it as work" if key in shown.works else "no run shows it"
    return Unused(path, "unfinished", f"its attempt ended {duration(age)} ago; {run}")


def _newest(path: Path) -> float:
    """Time of the last change at or below `path`; a lock is touched to learn the time."""
    times = (status.st_mtime for each, status in _below(path) if each.name != lease.LOCK)
    return max(times, default=0.0)


def _below(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """`path` and all below it, no link followed; a running step may remove some meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        yield path, status
        if stat.S_ISDIR(status.st_mode):
            for item in sorted(path.iterdir()):
                yield from _below(item)


def _reads(root: Path, entry: Path) -> Iterator[Key]:
    """Entries that this one needs: its links lead there, or its unfinished attempt reads them."""
    sealed = (entry / MANIFEST).exists()
    for path, status in _below(entry):
        if stat.S_ISLNK(status.st_mode) and not (sealed and path.is_relative_to(entry / WORK)):
            yield from (key for key, _ in targets(root, path))
    with contextlib.suppress(FileNotFoundError, ValueError):
        for other in [] if sealed else json.loads((entry / WORK / READS).read_bytes()):
            path = Path(os.path.normpath(entry / other))
            yield path.parent.name, path.name


def _leftovers(entry: Path) -> Iterator[Unused]:
    """What a sealed entry without a writer holds beside its value."""
    if not (entry / MANIFEST).exists() or lease.alive(entry / WORK):
        return
    damaged = entry / WORK / "damaged"
    if damaged.is_dir():
        yield Unused(damaged, "leftover", "damaged checkpoints of a training that is done")
    outer = damaged
    for path, _ in _below(entry):
        if path.name.startswith(filesystem.TEMPORARY) and not path.is_relative_to(outer):
            outer = path
            yield Unused(path, "temporary", "a killed process left it")


def _temporaries(root: Path, young: bool) -> Iterator[Unused]:
    """Temporary names of the store and of the directories in it."""
    for directory in (root, *_folders(root)):
        for path in sorted(directory.glob(f"{filesystem.TEMPORARY}*")):
            if path.name.startswith(REMOVED):
                yield Unused(path, "temporary", "a `clean` was killed while it removed this")
            elif young or time.time() - path.lstat().st_mtime >= YOUNG:
                yield Unused(path, "temporary", "a killed process left it")


def _measured(items: list[Unused]) -> list[Unused]:
    """The items with their sizes. A file with several hard links is freed with the last of them."""
    names: Counter[tuple[int, int]] = Counter()
    measured = []
    for item in items:
        size = 0
        for _, status in _below(item.path):
            if not stat.S_ISDIR(status.st_mode):
                names[status.st_dev, status.st_ino] += 1
                if names[status.st_dev, status.st_ino] == status.st_nlink:
                    size += status.st_size
        measured.append(replace(item, size=size))
    return measured
