"""Worker processes for the steps that make data: results in order, bounded memory, no hang.

Workers come from a fork server, because the main process may hold threads (a live progress bar),
and they end when the main process does, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from llava_steps.core import stop_signals
from llava_steps.core.errors import StepError
from llava_steps.data import fork_server

T = TypeVar("T")
R = TypeVar("R")


def ordered(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """`work(task)` for each task, in the order of the tasks, on `workers` processes.

    At most two tasks a worker are under way, so `tasks` may be a generator over huge data. One
    worker means this process. An exception of `work` is raised here, with its type.

    Raises:
        StepError: a worker process was killed.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    fork_server.start([work.__module__])
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    pending: deque[Future[R]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(work, task))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise StepError(
            "a worker process was killed; if it was for lack of memory, lower `workers`"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Have this worker hear of an interrupt, and end when the main process is gone.

    Otherwise its pipes would keep it waiting.
    """
    stop_signals.listen()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
