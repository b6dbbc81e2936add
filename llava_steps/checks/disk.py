"""Checks of the file systems of results and store: what a run relies on, and free space.

Entries are sealed by rename, shown by links, and guarded by a lease whose age is a file's time.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from llava_steps.checks.finding import Finding
from llava_steps.core import filesystem
from llava_steps.core.format import size

CLOCK = 30.0
"""Seconds that the clocks of this machine and of the file server may differ."""


def check(name: str, directory: Path) -> Iterator[Finding]:
    """Whether `directory` supports the file operations that a run relies on."""
    trial = directory / f"{filesystem.TEMPORARY}doctor-{secrets.token_hex(4)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        trial.mkdir()
        try:
            yield from _works(name, trial)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    except OSError as error:
        fix = "Make it writable, or name another directory in the configuration"
        yield Finding("fail", name, f"{directory}: {error.strerror}", fix)


def _works(name: str, trial: Path) -> Iterator[Finding]:
    begun = time.monotonic()
    file = trial / "file"
    for text in (b"first", b"second"):  # written, fsynced, renamed over the first, fsynced
        filesystem.write_bytes(file, text)
        if file.read_bytes() != text:
            yield Finding("fail", name, "a file that was replaced still reads as the old one")
    seconds = time.monotonic() - begun
    yield Finding("ok", name, f"write, fsync and rename work, {500 * seconds:.1f} ms each")
    (trial / "link").symlink_to("file")
    if (trial / "link").read_bytes() != b"second":
        yield Finding("fail", name, "symbolic links do not resolve to their target")
    try:
        os.link(file, trial / "second")
    except OSError as error:
        yield Finding(
            "note", name, f"hard links do not work ({error.strerror}); exports are copied"
        )
    with open(trial / "lock", "w") as first, open(trial / "lock", "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # expected
        except OSError as error:
            fix = "Mount it with lock support (NFS 4, or Lustre with -o flock)"
            yield Finding("fail", name, f"locks do not work: {error.strerror}", fix)
        else:
            fix = "Mount it with lock support"
            yield Finding("fail", name, "two processes can lock one file at a time", fix)
    late = abs(time.time() - file.stat().st_mtime)
    if late > CLOCK:
        fix = "Synchronise both with NTP: leases expire by the time of their file"
        yield Finding("fail", name, f"its clock differs from this machine's by {late:.0f} s", fix)


def free_space(name: str, directory: Path, needed: int | None) -> Finding:
    """Whether `needed` bytes (None: unknown) are free in `directory`."""
    free = shutil.disk_usage(directory).free
    if needed is None:
        return Finding("note", name, f"{size(free)} free; how much a run needs is not known yet")
    message = f"{size(free)} free, a run needs about {size(needed)}"
    fix = "Free some space, or name another directory in the configuration"
    return Finding("ok", name, message) if free > needed else Finding("fail", name, message, fix)
