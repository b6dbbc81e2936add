"""Asking a training to stop: at the next step boundary, with everything saved.

Imports nothing heavy: a worker listens from its first moment on, before torch is there.
"""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """`requested` turns true on SIGTERM, SIGINT and SIGUSR1; further ones change nothing."""

    def __init__(self) -> None:
        self.requested = False
        for number in SIGNALS:
            signal.signal(number, self._request)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
