"""The signals that ask for a stop: of a terminal, of Slurm, and of its warning before the end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """While it lasts, `handler` is called for these signals."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """While it lasts these signals wait; for processes started meanwhile until they listen."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def listen() -> None:
    """Let these signals through; those held back since this process began come now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
