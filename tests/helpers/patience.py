"""How long a test waits for what must happen.

Long on purpose: only a test that fails waits this long, and a machine may be busy with other
things. What must not take long is no matter of these tests.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

PATIENCE = 900.0
"""Seconds."""


def wait_for(
    condition: Callable[[], object],
    process: subprocess.Popen[str] | subprocess.Popen[bytes] | None = None,
    seconds: float = PATIENCE,
) -> None:
    """Until `condition()` holds; AssertionError when `process` ends before, or the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not ended or condition(), f"ended with code {process and process.returncode}"
        assert time.monotonic() < end, f"waited for {seconds:g} s in vain"
        time.sleep(0.01)
