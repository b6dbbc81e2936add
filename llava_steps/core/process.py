"""A process that ends with the one that started it, whatever ends that. Linux."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded by now where it is called behind a fork


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies. OSError when it would not.

    A parent that is gone already is not noticed: who must know asks for its number afterwards.
    """
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
