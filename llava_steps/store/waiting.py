"""Waiting for the process that writes an entry, instead of writing it too.

A step waits while it holds nothing that another process could wait for, and only for a process that
is running. So steps never wait for each other in a circle.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from llava_steps.store import lease
from llava_steps.store.store import MANIFEST, WORK, claimed, publish

LINE_EVERY = 30.0
"""Seconds between the lines of a process that waits."""


class Report:
    """Reports what a process waits for: a line at once, then one from time to time."""

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log, self._what = log, what
        self._since: float | None = None
        self._line = 0.0

    def __call__(self, holder: str) -> None:
        """`holder` has what this process waits for."""
        now = time.monotonic()
        if self._since is None:
            self._since = self._line = now
            self._log.info("%s is being computed by %s; waiting for its value", self._what, holder)
        elif now - self._line >= LINE_EVERY:
            self._line = now
            self._log.info(
                "waiting for %.0f s: %s is being computed by %s",
                now - self._since,
                self._what,
                holder,
            )

    @property
    def waited(self) -> bool:
        """Whether there was something to wait for."""
        return self._since is not None


def stamp(entry: Path) -> tuple[int, int] | None:
    """Distinguishes a sealed value from the one that replaces it; None for an unfinished entry."""
    try:
        status = (entry / MANIFEST).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def claimed_value(
    entry: Path, out: Path, waiting: lease.Waiting = lambda holder: None
) -> Iterator[bool]:
    """Keep `clean` from a value that is about to be shown; whether there is one."""
    if not (entry / MANIFEST).exists():
        yield False
        return
    with claimed(entry, out):
        lease.wait_until_free(entry / WORK, waiting)
        yield (entry / MANIFEST).exists()


def publish_whole(entry: Path | None, out: Path, waiting: lease.Waiting) -> bool:
    """Show the value that a share is part of; False when `clean` has just removed it."""
    if entry is None:
        return False
    with claimed_value(entry, out, waiting) as sealed:
        if sealed:
            publish(entry, out)
        return sealed


@contextlib.contextmanager
def only_writer(
    entry: Path, replaced: tuple[int, int] | None, waiting: lease.Waiting
) -> Iterator[lease.Lease]:
    """Hold the lease of an entry; waits for another holder.

    The value with the stamp `replaced` is set aside first. One that was sealed meanwhile is younger
    than the wish to compute it again, and stays.
    """
    while True:
        with lease.Lease(entry / WORK, waiting) as held:
            if replaced is None or stamp(entry) != replaced:
                (entry / WORK / "logs").mkdir(exist_ok=True)
                yield held
                return
            aside = _aside(entry)
            if held.rename(entry, aside):
                os.unlink(aside / WORK / lease.FILE)


def _aside(entry: Path) -> Path:
    number = 1
    while (aside := entry.with_name(f"{entry.name}.replaced-{number}")).exists():
        number += 1
    return aside
