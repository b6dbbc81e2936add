"""The file system that results and store lie on: does it keep what a run relies on, is there room.

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

CLOCK = 30.0
"""Seconds that the clocks of this machine and of the file server may differ."""


def check(name: str, place: Path) -> Iterator[Finding]:
    """Whether the directory `place` keeps what is written there, as a run relies on."""
    trial = place / f"{filesystem.TEMPORARY}doctor-{secrets.token_hex(4)}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        trial.mkdir()
        try:
            yield from _works(name, trial)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    except OSError as error:
        fix = "Make it writable, or name another directory in the configuration"
        yield Finding("fail", name, f"{place}: {error.strerror}", fix)


def _works(name: str, trial: Path) -> Iterator[Finding]:
    begun = time.monotonic()
    file = trial / "file"
    for text in (b"first", b"second"):  # written, fsynced, renamed over the first, fsynced
        filesystem.write_bytes(file, text)
        if file.read_bytes() != text:
            yield Finding("fail", name, "a file that replaced another reads as the old one")
    seconds = time.monotonic() - begun
    yield Finding("ok", name, f"write, fsync and rename work, {500 * seconds:.1f} ms each")
    (trial / "link").symlink_to("file")
    if (trial / "link").read_bytes() != b"second":
        yield Finding("fail", name, "symbolic links do not lead to their file")
    try:
        os.link(file, trial / "second")
    except OSError as error:
        yield Finding("note", name, f"no hard links ({error.strerror}): exports are copied")
    with open(trial / "lock", "w") as first, open(trial / "lock", "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # as it should be
        except OSError as error:
            fix = "Mount it with locks (NFS 4, or Lustre with -o flock)"
            yield Finding("fail", name, f"locks do not work: {error.strerror}", fix)
        else:
            yield Finding("fail", name, "two locks on one file at a time", "Mount it with locks")
    late = abs(time.time() - file.stat().st_mtime)
    if late > CLOCK:
        fix = "Set both by NTP: a lease counts as dead by its file's time"
        yield Finding("fail", name, f"its clock is {late:.0f} s from this machine's", fix)


def room(name: str, place: Path, needed: int | None) -> Finding:
    """Whether `needed` bytes are free in `place`; None where that is not known."""
    free = shutil.disk_usage(place).free
    if needed is None:
        return Finding("note", name, f"{free / 1e9:.1f} GB free; what a run needs is not known yet")
    found = f"{free / 1e9:.1f} GB free, a run needs about {needed / 1e9:.1f}"
    fix = "Free some, or name another directory in the configuration"
    return Finding("ok", name, found) if free > needed else Finding("fail", name, found, fix)
