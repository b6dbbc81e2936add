"""Noticing that a job stands still: workers leave a beat, the launcher looks at all of them.

A rank that hangs soon makes all others wait for it in a collective, so progress anywhere is
progress; when there is none, the rank with the oldest beat is the one to look at. Its stack, and
those of all others, go to `logs/stack-RANK.txt`. While a rank is busy with something that has no
small steps (starting, saving) all are given longer.
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
    """A worker's sign of life; busy, with the start, until it is called `settled`."""

    def __init__(self, rank: int, logs: Path) -> None:
        self._path = Path(os.environ[BEATS], f"beat-{rank:04d}")
        self._busy = Path(os.environ[BEATS], f"busy-{rank:04d}")
        self._busy.touch()
        self._tasks = {"start"}
        logs.mkdir(parents=True, exist_ok=True)
        # Written by C code in the signal handler: works while Python waits in a collective.
        self._file = (logs / f"stack-{rank:04d}.txt").open("w")
        faulthandler.register(DUMP, self._file, all_threads=True)

    def __call__(self) -> None:
        self._path.touch()

    def settled(self) -> None:
        """The start is over: from here on there is a beat every few seconds."""
        self._end("start")

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Something that may take long without a beat."""
        self._tasks.add("busy")
        self._busy.touch()
        try:
            yield
        finally:
            self._end("busy")

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """What comes behind it may take long without a beat, to the end of this process."""
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
    """The launcher's eye on `workers`, which leave their beats in `beats`."""

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
        """Seconds that are granted at present: of `limits` the second while any rank is busy."""
        self._newest, self._since = 0, time.monotonic()

    def stalled(self) -> int | None:
        """The rank to look at when no rank has made progress for too long; else None."""
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
        """Have every worker write its stack; what is known of each, a line a rank."""
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
    """When the file was touched, in ns; 0 when it is not there."""
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
