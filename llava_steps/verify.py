"""Are these artefacts whole? Compares every file with its manifest, sha256 included.

    python -m llava_steps.verify                       everything below results/
    python -m llava_steps.verify results/demo store    a run and a whole store

Exit codes: 0 all whole · 3 nothing found · 4 something is damaged. Work in progress is listed, and
is no damage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_steps.core import store
from llava_steps.core.errors import InputError, IntegrityError, StepError


def artefacts(root: Path) -> Iterator[Path]:
    """Directories at or below `root` that hold a manifest, or work towards one."""
    for directory, folders, names in os.walk(root):
        folders.sort()
        entry = Path(directory)
        if store.MANIFEST in names or store.WORK in folders or (entry / "work").is_symlink():
            folders.clear()
            yield entry


def verify(entry: Path) -> tuple[str, str]:
    """(state, remark) of an artefact; IntegrityError when a file is not what was sealed."""
    manifest = store.read_manifest(entry)
    if manifest is None:
        return "unfinished", "no manifest yet; run its step again to continue it"
    store.check(entry, manifest, digests=True)
    files = manifest["files"]
    size = sum(file["size"] for file in files)
    return "whole", f"{len(files)} files, {size:,} bytes, {manifest['step']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per artefact; the exit code tells the worst of them."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_steps.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        default=[Path("results")],
        help="artefacts, or directories that hold some (default: results)",
    )
    found = damaged = 0
    for root in parser.parse_args(arguments).paths:
        for entry in artefacts(root):
            found += 1
            try:
                state, remark = verify(entry)
            except IntegrityError as error:
                damaged += 1
                state, remark = "damaged", str(error)
            print(f"{state:<11} {entry}  {remark}")
    print(f"{found} artefacts, {damaged} damaged")
    if not found:
        return InputError.exit_code
    return IntegrityError.exit_code if damaged else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except StepError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
