"""Detects that a job hangs: workers leave beats, and the launcher checks them.

A rank that hangs soon makes all others wait for it in a collective, so progress of any rank counts.
Without progress, the rank with the oldest beat is the suspect. Its stack, and those of all others,
go to `logs/stack-RANK.txt`. While a rank is busy with a long task (starting, saving), the limit is
longer for all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

DUMP = signal.SIGUSR2
BEATS = "LLAVA_STEPS_BEATS"
"""Environment variable: directory of the beats."""


class Beat:
    """A worker's sign of life; busy with the start until `settled` is called."""

    def __init__(self, rank: int, logs: Path) -> None:
        self._path = Path(os.environ[BEATS], f"beat-{rank:04d}")
        self._busy = Path(os.environ[BEATS], f"busy-{rank:04d}")
        self._busy.touch()
        self._tasks = {"start"}
        logs.mkdir(parents=True, exist_ok=True)
        # Written by C code in the signal handler, so it works while Python waits in a collective.
        self._file = (logs / f"stack-{rank:04d}.txt").open("w")
        faulthandler.register(DUMP, self._file, all_threads=True)

    def __call__(self) -> None:
        self._path.touch()

    def settled(self) -> None:
        """The start is over: from here on there is a beat every few seconds."""
        self._end("start")

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """A task that may take long without a beat."""
        self._tasks.add("busy")
        self._busy.touch()
        try:
            yield
        finally:
            self._end("busy")

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """From here to the end of this process it may take long without a beat."""
        try:
            yield
        finally:
            self._tasks.add("end")
            self._busy.touch()

    def _end(self, task: str) -> None:
        self()
        self._tasks.discard(task)
        if not self._tasks:
            self._busy.unlink(missing_ok=True)


class Watch:
    """The launcher's check of `workers`, which leave their beats in `beats`."""

    def __init__(
        self,
        beats: Path,
        workers: Sequence[subprocess.Popen[bytes]],
        limits: tuple[float, float],
        first: int = 0,
    ) -> None:
        self._beats, self._workers, self._limits = beats, workers, limits
        self._first = first  # rank of the first of them
        self.limit = 0.0
        """The present limit in seconds: the second of `limits` while any rank is busy."""
        self._newest, self._since = 0, time.monotonic()

    def stalled(self) -> int | None:
        """The suspect when no rank has made progress for too long; else None."""
        ranks = range(self._first, self._first + len(self._workers))
        times = {rank: _touched(self._beats / f"beat-{rank:04d}") for rank in ranks}
        now = time.monotonic()
        if max(times.values()) != self._newest:
            self._newest, self._since = max(times.values()), now
        starting = not all(times.values())
        busy = starting or any((self._beats / f"busy-{rank:04d}").exists() for rank in ranks)
        self.limit = self._limits[busy]
        if not self.limit or now - self._since < self.limit:
            return None
        return min(times, key=lambda rank: times[rank])

    def dump(self, logs: Path) -> str:
        """Have every worker write its stack; returns a line per rank."""
        states = []
        for worker in self._workers:
            if worker.poll() is None:
                worker.send_signal(DUMP)
        time.sleep(0.5)
        for rank, worker in enumerate(self._workers, self._first):
            state = _state(worker.pid)
            stack = logs / f"stack-{rank:04d}.txt"
            top = _innermost(stack.read_text() if stack.exists() else "")
            states.append(f"rank {rank} ({state}): {top or 'no stack'}")
        return "\n".join(states)


def _touched(path: Path) -> int:
    """When the file was touched, in ns; 0 if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _state(pid: int) -> str:
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return {"R": "running", "S": "waiting", "D": "waiting for a disk", "T": "stopped"}.get(
        letter, letter
    )


def _innermost(text: str) -> str:
    """The first frames of the current thread, on one line."""
    frames = []
    for line in text.partition("Current thread")[2].splitlines()[1:4]:
        frames.append(" ".join(line.split()))
    return " < ".join(frames)
