"""The process that worker processes are forked from; one for each process that has workers."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker

from llava_steps.core import stop_signals


def start(preload: Sequence[str]) -> None:
    """Start the fork server unless it runs; returns at once.

    A fork server, because this process holds threads (of torch, of the process group, of a live
    progress bar): a fork of it may inherit a lock that no thread will ever release. A stop is asked
    of whole process groups, while the training still needs its workers for the last step: the
    server and its children block these signals from their first moment on, inherited from here,
    the caller of the server. A caller whose workers should receive them unblocks them there.

    Args:
        preload: modules that the server imports; of those that start it the first decides.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # starting it would unblock them again
    with stop_signals.held_back():
        forkserver.ensure_running()
