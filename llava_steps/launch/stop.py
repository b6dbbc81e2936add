"""Requests to stop a training: at the next step boundary, with everything saved.

Imports nothing slow: a worker handles signals from its start, before torch is loaded.
"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

from llava_steps.core.stop_signals import STOP_SIGNALS, listen


def age(pid: int) -> float:
    """Seconds since a process of this machine began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


class StopRequest:
    """`requested` becomes true on SIGTERM, SIGINT and SIGUSR1, and before the time limit."""

    def __init__(self) -> None:
        self.signalled = False
        """Whether a signal requested it."""
        self._start = time.monotonic()
        self._limit = math.inf
        self._aside = 0.0
        for number in STOP_SIGNALS:
            signal.signal(number, self._request)
        listen()

    def _request(self, number: int, frame: object) -> None:
        self.signalled = True

    def limit(self, minutes: float, launcher: int | None = None) -> None:
        """Stop this long after process `launcher`, or this request, started; 0: no limit.

        The time of the launcher counts, because it read the inputs within the time of the job.
        """
        if not minutes:
            return
        self._limit = 60.0 * minutes
        if launcher is not None:
            self._start = time.monotonic() - age(launcher)

    def set_aside(self, seconds: float) -> None:
        """Reserve twice the time of the longest step or save so far."""
        self._aside = max(self._aside, 2.0 * seconds)

    @property
    def requested(self) -> bool:
        """Whether to stop at the next step boundary."""
        return self.signalled or time.monotonic() - self._start + self._aside > self._limit
