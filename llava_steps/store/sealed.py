"""Sealed directories: a marker, written last, lists the files with their size and sha256.

A directory without its marker does not count. One whose files disagree with it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llava_steps.core import filesystem
from llava_steps.core.errors import IntegrityError


@dataclass(frozen=True)
class SealedFile:
    """A file as its marker lists it."""

    name: str
    """Relative to the sealed directory."""
    size: int
    sha256: str


def list_files(
    root: Path, skip: Iterable[str], sha256: Callable[[Path], str] = filesystem.sha256_file
) -> list[SealedFile]:
    """The files below `root` in a fixed order, without the top-level names in `skip`."""
    return [
        SealedFile(path.relative_to(root).as_posix(), path.stat().st_size, sha256(path))
        for path in filesystem.files_below(root, skip)
    ]


def write_marker(marker: Path, content: bytes) -> None:
    """Write the marker after everything beside it is on stable storage."""
    filesystem.fsync_tree(marker.parent)
    filesystem.write_bytes(marker, content)


def verify(
    marker: Path,
    files: Iterable[SealedFile],
    advice: str,
    sha256: Callable[[Path], str] | None = filesystem.sha256_file,
) -> None:
    """Compare the files beside a marker with what it lists; without `sha256` nothing is read.

    Raises:
        IntegrityError: names the first file that differs, and ends with `advice`.
    """
    for file in files:
        path = marker.parent / file.name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing though {marker.name} lists it; {advice}")
        size = path.stat().st_size
        if size != file.size:
            raise IntegrityError(
                f"{path} has {size} bytes, {marker.name} says {file.size}; {advice}"
            )
        if sha256 is not None and sha256(path) != file.sha256:
            raise IntegrityError(f"{path} has another sha256 than {marker.name} says; {advice}")
