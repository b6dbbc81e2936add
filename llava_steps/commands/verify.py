"""Are these artefacts whole? Compares every file with its manifest, sha256 included.

    llava-steps verify                       everything below results/
    llava-steps verify results/demo store    a run and a whole store

Exit codes: 0 all whole · 3 a path holds no artefact · 4 something is damaged. Work in progress is
listed and does not count as damage; the checkpoints that it has committed are compared too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, IntegrityError, reason
from llava_steps.settings import cli
from llava_steps.store import commit, store


def artefacts(root: Path) -> Iterator[Path]:
    """Directories at or below `root` that hold a manifest, or work towards one.

    A run's own directory has a `.work` too, for the lease on its name, but no logs of attempts.
    """
    for directory, folders, names in os.walk(root):
        folders.sort()
        entry = Path(directory)
        begun = (entry / store.WORK / "logs").is_dir() or (entry / "work").is_symlink()
        if store.MANIFEST in names or begun:
            folders.clear()
            yield entry


def verify(entry: Path) -> tuple[str, str]:
    """(state, remark) of an artefact; IntegrityError when a file is not what was sealed."""
    manifest = store.read_manifest(entry)
    if manifest is None:
        work = entry / "work" if (entry / "work").is_symlink() else entry
        checkpoints = commit.committed(work)
        for _, path in checkpoints:
            commit.read_commit(path)
        kept = f"; committed so far: {', '.join(p.name for _, p in checkpoints)}" * bool(
            checkpoints
        )
        return "unfinished", f"no manifest yet; run its step again to continue it{kept}"
    try:
        store.check(entry, manifest)
        known = {file["path"] for file in manifest["files"]}
        size = sum(file["size"] for file in manifest["files"])
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{entry / store.MANIFEST} is damaged: {error!r}") from None
    except OSError as error:
        raise IntegrityError(f"{entry} cannot be read: {reason(error)}") from None
    for path in filesystem.files_below(entry, skip=[store.WORK, store.MANIFEST]):
        if path.relative_to(entry).as_posix() not in known:
            raise IntegrityError(f"{path} was not sealed with the artefact; remove it")
    return "whole", f"{len(known)} files, {size:,} bytes, {manifest.get('step')}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.tool_parser("verify", __doc__)
    made.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        default=[Path("results")],
        help="artefacts, or directories that hold some (default: results)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per artefact; the exit code is that of the worst of them."""
    checked = damaged = 0
    empty: list[Path] = []
    for root in parser().parse_args(arguments).paths:
        before = checked
        for entry in artefacts(root):
            checked += 1
            try:
                state, remark = verify(entry)
            except (IntegrityError, InputError) as error:
                damaged += 1
                state, remark = "damaged", str(error)
            print(f"{state:<11} {entry}  {remark}")
        if checked == before:
            empty.append(root)
    print(f"{checked} artefacts, {damaged} damaged")
    for root in empty:
        print(f"{root} holds no artefact", file=sys.stderr)
    if damaged:
        return IntegrityError.exit_code
    return InputError.exit_code if empty else 0
