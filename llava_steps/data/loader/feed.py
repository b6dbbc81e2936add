"""From positions of the stream to the steps of one rank, ahead of the training.

A step goes through three states: its lengths are asked for (packing only), its rows are asked for,
its rows are there. A thread moves steps along while the training computes; what it does itself is
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
from llava_steps.data.loader.row_builder import RowMaker
from llava_steps.data.loader.workers import Task, Workers, perform

_ROWS_AHEAD = 4
"""Rows that wait for the training, for each worker; at least one whole step does."""
_CHUNK = 16
"""Samples whose lengths are asked for together."""


@dataclass(frozen=True)
class Layout:
    """How a global batch is divided into rows, and which of them are this rank's."""

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    capacity: int | None
    """Tokens of a packed row; None without packing."""
    shift: float
    """Where in a global batch this rank begins to find out lengths, in [0, 1)."""
    rows_multiple: int = 1
    """The number of packed rows of a rank is a multiple of this."""

    def rows(self, lengths: list[int] | None) -> list[list[int]]:
        """Places in the global batch of this rank's samples, row by row."""
        if self.capacity is not None:
            assert lengths is not None
            packed = pack(lengths, self.capacity, self.dp_size * self.rows_multiple)
            return packed[self.dp_rank :: self.dp_size]
        size, share = self.micro_batch_size, self.micro_batch_size * self.dp_size
        starts = range(self.dp_rank * size, self.global_batch_size, share)
        return [list(range(start, start + size)) for start in starts]

    def chunks(self) -> list[range]:
        """Places whose lengths are found out together; other ranks begin with others."""
        chunks = [
            range(start, min(start + _CHUNK, self.global_batch_size))
            for start in range(0, self.global_batch_size, _CHUNK)
        ]
        turn = int(self.shift * len(chunks))
        return chunks[turn:] + chunks[:turn]


@dataclass
class _Step:
    """One step on its way."""

    first: int
    """Position of its first sample."""
    lengths: list[int]
    lengths_missing: int
    rows: list[MicroBatch | None] | None = None
    rows_missing: int = 0


def serial(maker: RowMaker, layout: Layout, first: int) -> Iterator[list[MicroBatch]]:
    """This rank's rows step by step from position `first` on, made when they are asked for."""
    while True:
        lengths = None
        if layout.capacity is not None:
            places = range(first, first + layout.global_batch_size)
            lengths = maker.lengths(places)
        tasks = _row_tasks(layout, first, lengths)
        yield [perform(maker, task) for task in tasks]
        first += layout.global_batch_size


def _row_tasks(layout: Layout, first: int, lengths: list[int] | None) -> list[Task]:
    return [
        Task("row", (first, row, sum(lengths[i] for i in row) if lengths else None))
        for row in layout.rows(lengths)
    ]


class Feed(threading.Thread):
    """`serial` with worker processes, ahead of whoever iterates; to be closed afterwards."""

    def __init__(self, workers: Workers, layout: Layout, first: int) -> None:
        super().__init__(name="loader", daemon=True)
        self._workers = workers
        self._layout = layout
        self._next = first
        self._ahead = _ROWS_AHEAD * len(workers.workers)
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
        return self._rows < self._ahead and sum(step.rows is None for step in self._steps) < 2

    def _open(self) -> _Step:
        layout, first = self._layout, self._next
        self._next += layout.global_batch_size
        if layout.capacity is None:
            return _Step(first, [], 0)
        step = _Step(first, [0] * layout.global_batch_size, layout.global_batch_size)
        for places in layout.chunks():
            task = Task("lengths", ([first + place for place in places],))
            self._owners[self._workers.submit(task)] = (step, places)
        return step

    def _plan(self, step: _Step) -> None:
        tasks = _row_tasks(self._layout, step.first, step.lengths or None)
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
