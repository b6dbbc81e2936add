"""A process that ends with its parent, however the parent ends. Linux only."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)  # already loaded when it is called after a fork


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; OSError if that is not possible.

    A parent that has already ended is not noticed; the caller can check `os.getppid()` afterwards.
    """
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
