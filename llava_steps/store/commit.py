"""Directories that are committed as one: `commit.json` is written last, then the name is given.

Used for the checkpoints of a training step. A directory without a commit file, or under a
temporary name, does not exist for any reader; one whose files disagree with it is refused.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.store import sealed
from llava_steps.store.sealed import SealedFile

MARKER = "commit.json"
ADVICE = "restore the checkpoint from a copy, or run the step that made it again"
_ITERATION = re.compile(r"^iter_(\d{7,})$")


def iteration_name(step: int) -> str:
    """`iter_0000042` for 42."""
    return f"iter_{step:07d}"


def commit_dir(temporary: Path, final: Path, info: dict[str, Any] | None = None) -> None:
    """Seal the files below `temporary` and give them the name `final`.

    Everything is on stable storage before the rename; `final` must not be committed yet.
    """
    remove_uncommitted(final)
    files = {
        file.name: {"size": file.size, "sha256": file.sha256}
        for file in sealed.list_files(temporary, [MARKER])
    }
    sealed.write_marker(temporary / MARKER, _marker(files, info or {}))
    os.rename(temporary, final)
    filesystem.fsync_path(final.parent)


def _marker(files: dict[str, Any], info: dict[str, Any]) -> bytes:
    """The marker's bytes: it names its own digest, for it is data too."""
    content = {"files": files, "info": info}
    return filesystem.dump_json(content | {"sha256": filesystem.sha256_json(content)}).encode()


def remove_uncommitted(path: Path) -> None:
    """Delete `path` if it is a directory that was never committed."""
    if (path / MARKER).exists():
        raise IntegrityError(f"{path} is already committed; refusing to overwrite it")
    filesystem.remove(path)


def read_commit(path: Path) -> dict[str, Any]:
    """The `info` of a committed directory, after its files were compared with the marker.

    Raises IntegrityError naming the first file that is missing or has another size or sha256, one
    for files that the marker does not know, and one when the marker itself was changed.
    """
    try:
        raw = (path / MARKER).read_bytes()
        marker = json.loads(raw)
        files = [
            SealedFile(name, int(file["size"]), str(file["sha256"]))
            for name, file in marker["files"].items()
        ]
        info: dict[str, Any] = marker["info"]
    except FileNotFoundError:
        raise InputError(f"{path} is not a committed checkpoint: it has no {MARKER}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path / MARKER} is damaged: {error!r}") from None
    if raw != _marker(marker["files"], info):
        raise IntegrityError(f"{path / MARKER} is damaged: it is not what was written")
    sealed.verify(path / MARKER, files, ADVICE)
    listed = {file.name for file in files}
    for file in filesystem.files_below(path, skip=[MARKER]):
        name = file.relative_to(path).as_posix()
        if name not in listed:
            raise IntegrityError(f"{file} does not belong to the checkpoint; {ADVICE}")
    return info


def iterations(root: Path) -> list[tuple[int, Path]]:
    """All `iter_*` of `root` as (iteration, path), oldest first.

    One without a marker is what `prune` was killed at, if a committed one is newer. Otherwise it
    has lost its marker, for it got its name with one.
    """
    matches = [(_ITERATION.match(p.name), p) for p in (root.iterdir() if root.is_dir() else ())]
    return sorted((int(match[1]), path) for match, path in matches if match)


def committed(root: Path) -> list[tuple[int, Path]]:
    """Those of `iterations` that have their marker."""
    return [(number, path) for number, path in iterations(root) if (path / MARKER).is_file()]


def latest_commit(root: Path) -> Path:
    """The newest committed `iter_*` directory below `root`, or `root` when it is one itself."""
    if (root / MARKER).is_file():
        return root
    checkpoints = committed(root)
    if not checkpoints:
        raise InputError(
            f"{root} holds no committed checkpoint (expected iter_*/{MARKER}); "
            "give the directory of a finished conversion or training step"
        )
    return checkpoints[-1][1]


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep` committed directories of `root`, and unfinished ones.

    With `keep_every`, those whose iteration is a multiple of it stay as well.
    """
    checkpoints = committed(root)
    for iteration, path in checkpoints[: max(0, len(checkpoints) - keep)]:
        if not (keep_every and iteration % keep_every == 0):
            # Without its marker the directory no longer counts, even if the rest is not deleted.
            (path / MARKER).unlink()
    for path in root.iterdir():
        if _ITERATION.match(path.name) and not (path / MARKER).exists():
            filesystem.remove(path)
    filesystem.remove_temporaries(root)
