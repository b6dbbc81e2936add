"""Noticing that a job stands still: workers leave a beat, the launcher looks at all of them.

A rank that hangs soon makes all others wait for it in a collective, so progress anywhere is
progress; when there is none, the rank with the oldest beat is the one to look at. Its stack, and
those of all others, go to `logs/stack-RANK.txt`.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

DUMP = signal.SIGUSR2
BEATS = "LLAVA_STEPS_BEATS"
"""Environment variable: directory of the beats."""


class Beat:
    """A worker's sign of life."""

    def __init__(self, rank: int, logs: Path) -> None:
        self._path = Path(os.environ[BEATS], f"beat-{rank:04d}")
        logs.mkdir(parents=True, exist_ok=True)
        # Written by C code in the signal handler: works while Python waits in a collective.
        self._file = (logs / f"stack-{rank:04d}.txt").open("w")
        faulthandler.register(DUMP, self._file, all_threads=True)

    def __call__(self) -> None:
        self._path.touch()


class Watch:
    """The launcher's eye on `workers`, which leave their beats in `beats`."""

    def __init__(
        self, beats: Path, workers: Sequence[subprocess.Popen[bytes]], limit: float
    ) -> None:
        self._beats, self._workers, self._limit = beats, workers, limit
        self._newest, self._since = 0, time.monotonic()

    def stalled(self) -> int | None:
        """The rank to look at when no rank has made progress for too long; else None."""
        times = {
            rank: path.stat().st_mtime_ns
            for rank in range(len(self._workers))
            if (path := self._beats / f"beat-{rank:04d}").exists()
        }
        if not self._limit or len(times) < len(self._workers):
            return None
        now = time.monotonic()
        if max(times.values()) != self._newest:
            self._newest, self._since = max(times.values()), now
        if now - self._since < self._limit:
            return None
        return min(times, key=lambda rank: times[rank])

    def dump(self, logs: Path) -> str:
        """Have every worker write its stack; what is known of each, a line a rank."""
        states = []
        for worker in self._workers:
            if worker.poll() is None:
                worker.send_signal(DUMP)
        time.sleep(0.5)
        for rank, worker in enumerate(self._workers):
            state = _state(worker.pid)
            stack = logs / f"stack-{rank:04d}.txt"
            top = _innermost(stack.read_text() if stack.exists() else "")
            states.append(f"rank {rank} ({state}): {top or 'no stack'}")
        return "\n".join(states)


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
