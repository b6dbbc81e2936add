"""Files that are whole or absent: atomic writes, fsync, digests.

A reader of anything written here sees the old bytes or the new bytes, after a crash too: the data
goes to a temporary name in the same directory, is fsynced, renamed, and the directory is fsynced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava_steps.core.errors import IntegrityError

TEMPORARY = ".tmp-"
"""Prefix of names that a crash may leave behind and that every reader ignores."""


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Put `path` into an OSError that has none.

    The system does not say where a write failed, and the user has to know where to make room.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def fsync_path(path: Path) -> None:
    """Flush one file or directory to stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace `path` by `data` atomically and durably; the umask applies to `mode` as usual."""
    # A process id is not enough: machines and containers that share the directory repeat it.
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with (
            named(path),
            open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file,
        ):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def dump_json(value: Any, indent: int | None = 2) -> str:
    """JSON that is the same for the same value: sorted keys, no NaN, newline at the end."""
    return (
        json.dumps(value, sort_keys=True, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    )


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the canonical JSON of `value` atomically."""
    write_bytes(path, dump_json(value).encode())


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(dump_json(value, indent=None).encode()).hexdigest()


def files_below(root: Path, skip: Iterable[str] = ()) -> Iterator[Path]:
    """All regular files below `root` in a fixed order, without top-level names in `skip`.

    Links to files count as the file; temporary names are left out.
    """
    skipped = set(skip)
    for directory, folders, names in os.walk(root, followlinks=True):
        top = Path(directory) == root
        folders[:] = sorted(
            f for f in folders if not f.startswith(TEMPORARY) and not (top and f in skipped)
        )
        for name in sorted(names):
            if not name.startswith(TEMPORARY) and not (top and name in skipped):
                yield Path(directory, name)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name: a hard link, or a copy where links cannot be made.

    Raises:
        IntegrityError: the copy differs.
    """
    try:
        os.link(source.resolve(), target)
    except OSError:  # another device, a file system without links, too many of them
        temporary = target.with_name(f"{TEMPORARY}{target.name}")
        shutil.copyfile(source, temporary)
        fsync_path(temporary)
        if sha256_file(temporary) != sha256_file(source):
            raise IntegrityError(
                f"{target} differs from {source} after copying; check the disk and run again"
            ) from None
        os.replace(temporary, target)


def fsync_tree(root: Path) -> None:
    """Flush every file and directory below `root`, then `root` itself."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync_path(Path(directory, name))
        fsync_path(Path(directory))


def remove(path: Path) -> None:
    """Delete a file, a link or a whole directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_temporaries(root: Path) -> None:
    """Delete what killed writers left directly below `root`."""
    for path in root.glob(f"{TEMPORARY}*"):
        remove(path)
