"""Content digests of a step's inputs, with a cache so that unchanged files are read once.

The cache maps (device, inode, size, mtime, ctime) to a sha256 and only ever saves reading: an
entry is used when all five agree, and the change time cannot be set back by a user.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError

CACHE = "digests.json"


class Digests:
    """sha256 of files and trees; `save()` keeps what was learnt in `<store>/digests.json`."""

    def __init__(self, store: Path) -> None:
        self._path = store / CACHE
        self._known = self._read()
        self._new = False

    @property
    def store(self) -> Path:
        """The store that the cache belongs to."""
        return self._path.parent

    def file(self, path: Path) -> str:
        """Hex sha256 of one file."""
        stat = path.stat()
        key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        if key not in self._known:
            self._known[key] = filesystem.sha256_file(path)
            self._new = True
        return self._known[key]

    def files(self, root: Path, paths: Iterable[Path]) -> str:
        """Digest of the relative names and contents of some files below `root`."""
        listing = {path.relative_to(root).as_posix(): self.file(path) for path in paths}
        return filesystem.sha256_json(listing)

    def path(self, path: Path) -> str:
        """Digest of a file, or of all files below a directory with their relative names."""
        if path.is_file():
            return self.file(path)
        if path.is_dir():
            return self.files(path, filesystem.files_below(path))
        raise InputError(f"input {path} does not exist")

    def of_name(self, name: str) -> str | None:
        """Digest of what a hub id named when a step last read it; None if it is not known."""
        return self._known.get(f"hub {name}")

    def keep_name(self, name: str, digest: str) -> None:
        """Keep what a hub id names, for planning where the hub is out of reach."""
        if self._known.get(f"hub {name}") != digest:
            self._known[f"hub {name}"] = digest
            self._new = True

    def reload(self) -> None:
        """Learn what others have read since this process read the cache."""
        self._known = self._read() | self._known

    def save(self) -> None:
        """Write the cache when it learnt something, keeping what others wrote meanwhile."""
        if self._new:
            self._known = self._read() | self._known
            filesystem.write_json(self._path, self._known)
            self._new = False

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError):
            # Only a cache: its contents can be computed again.
            return {}
        return known if isinstance(known, dict) else {}
