"""From positions of the stream to the steps of one rank, before the training needs them.

A step goes through three states: its lengths are asked for (packing only), its rows are asked for,
its rows are ready. A thread moves steps along while the training computes; what it does itself is
planning and mapping memory, so that it never holds the training up.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llava_steps.data.loader.batch import MicroBatch
from llava_steps.data.loader.packing import pack
from llava_steps.data.loader.row_builder import RowBuilder
from llava_steps.data.loader.spec import LoaderSpec
from llava_steps.data.loader.workers import Task, Workers, perform

_PREFETCH_ROWS = 4
"""Rows that wait for the training, for each worker; at least one whole step does."""
_CHUNK = 16
"""Samples whose lengths are asked for together."""


def rank_rows(spec: LoaderSpec, lengths: list[int] | None) -> list[list[int]]:
    """Slots in the global batch of this rank's samples, row by row; `lengths` is for packing."""
    if lengths is not None:
        packed = pack(lengths, spec.capacity, spec.dp_size * spec.rows_multiple)
        return packed[spec.dp_rank :: spec.dp_size]
    size, share = spec.micro_batch_size, spec.micro_batch_size * spec.dp_size
    starts = range(spec.dp_rank * size, spec.global_batch_size, share)
    return [list(range(start, start + size)) for start in starts]


def chunks(spec: LoaderSpec) -> list[range]:
    """Slots whose lengths are determined together; other ranks begin with others."""
    size = spec.global_batch_size
    ranges = [range(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK)]
    turn = int(spec.shift * len(ranges))
    return ranges[turn:] + ranges[:turn]


@dataclass
class _Step:
    """One step on its way."""

    first: int
    """Position of its first sample."""
    lengths: list[int]
    lengths_missing: int
    rows: list[MicroBatch | None] | None = None
    rows_missing: int = 0


def serial(builder: RowBuilder, spec: LoaderSpec, first: int) -> Iterator[list[MicroBatch]]:
    """This rank's rows step by step from position `first` on, made when they are asked for."""
    while True:
        lengths = None
        if spec.packing:
            lengths = builder.lengths(range(first, first + spec.global_batch_size))
        tasks = _row_tasks(spec, first, lengths)
        yield [perform(builder, task) for task in tasks]
        first += spec.global_batch_size


def _row_tasks(spec: LoaderSpec, first: int, lengths: list[int] | None) -> list[Task]:
    return [
        Task("row", (first, row, sum(lengths[i] for i in row) if lengths else None))
        for row in rank_rows(spec, lengths)
    ]


class Feed(threading.Thread):
    """`serial` with worker processes, made before they are asked for; to be closed afterwards."""

    def __init__(self, workers: Workers, spec: LoaderSpec, first: int) -> None:
        super().__init__(name="loader", daemon=True)
        self._workers = workers
        self._spec = spec
        self._next = first
        self._prefetch_rows = _PREFETCH_ROWS * len(workers.workers)
        self._steps: deque[_Step] = deque()
        self._owners: dict[int, tuple[_Step, Any]] = {}
        self._out: queue.SimpleQueue[list[MicroBatch] | BaseException] = queue.SimpleQueue()
        self._given: deque[int] = deque()
        """Rows of each step that was given out, until the thread takes note of it."""
        self._unread = 0
        """Steps that are ready and not given out."""
        self._rows = 0
        """Rows that were asked for and not given out."""
        self._closing = False
        self._wake, self._waker = os.pipe()
        self.start()

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """The steps; raises what ended the thread."""
        while True:
            item = self._out.get()
            if isinstance(item, BaseException):
                raise item
            self._given.append(len(item))
            os.write(self._waker, b".")
            yield item

    def close(self) -> None:
        """End thread and workers."""
        if not self._closing:
            self._closing = True
            os.write(self._waker, b".")
            self.join()
            os.close(self._wake)
            os.close(self._waker)

    def run(self) -> None:
        """The thread."""
        try:
            while not self._closing:
                self._ask()
                for ticket, result in self._workers.results(self._wake):
                    self._take(*self._owners.pop(ticket), result)
                self._notice()
        except BaseException as error:
            self._out.put(error)
        finally:
            self._workers.close()

    def _ask(self) -> None:
        """Open steps until enough is on its way, and ask for the rows of those with a plan."""
        while self._wants_more():
            step = self._open()
            self._steps.append(step)
            if not step.lengths_missing:
                self._plan(step)

    def _wants_more(self) -> bool:
        if len(self._steps) + self._unread < 2:
            return True
        # How many rows a step will be is not known before it has a plan.
        unplanned = sum(step.rows is None for step in self._steps)
        return self._rows < self._prefetch_rows and unplanned < 2

    def _open(self) -> _Step:
        first, size = self._next, self._spec.global_batch_size
        self._next += size
        if not self._spec.packing:
            return _Step(first, [], 0)
        step = _Step(first, [0] * size, size)
        for slots in chunks(self._spec):
            task = Task("lengths", ([first + slot for slot in slots],))
            self._owners[self._workers.submit(task)] = (step, slots)
        return step

    def _plan(self, step: _Step) -> None:
        tasks = _row_tasks(self._spec, step.first, step.lengths or None)
        step.rows = [None] * len(tasks)
        step.rows_missing = len(tasks)
        self._rows += len(tasks)
        for number, task in enumerate(tasks):
            self._owners[self._workers.submit(task)] = (step, number)

    def _take(self, step: _Step, what: Any, result: Any) -> None:
        if isinstance(what, range):
            step.lengths[what.start : what.stop] = result
            step.lengths_missing -= len(what)
            if not step.lengths_missing:
                self._plan(step)
        else:
            assert step.rows is not None
            step.rows[what] = result
            step.rows_missing -= 1
        while self._steps and self._steps[0].rows and not self._steps[0].rows_missing:
            done = self._steps.popleft()
            self._unread += 1
            self._out.put([row for row in done.rows or [] if row is not None])

    def _notice(self) -> None:
        """Take note of what the training has taken."""
        while self._given:
            self._rows -= self._given.popleft()
            self._unread -= 1
            os.read(self._wake, 1)
