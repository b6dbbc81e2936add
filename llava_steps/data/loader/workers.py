"""Worker processes of the loader, and the watch over them.

Each worker has its own socket: it gets tasks as JSON, one more than it
works on, and answers with JSON and, for a row, the descriptor of a file in memory (wire.py). On a
board that both see it notes which sample it has begun, so that a worker that dies or hangs can be
reported with what it held. When the training ends, however it ends, the sockets close and the
workers go.
"""

from __future__ import annotations

import array
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import torch

from llava_steps.core.errors import StepError
from llava_steps.data import fork_server
from llava_steps.data.loader import wire
from llava_steps.data.loader.row_builder import RowBuilder

_MESSAGE = 1 << 20
_TRACEBACK = 20_000
"""Characters of a traceback that are passed on."""
_DEPTH = 2
"""Tasks that a worker has at the same time."""
_TICK = 1.0
"""Seconds between two readings of the board."""
_NOTHING = -1


@dataclass(frozen=True)
class Task:
    """Something that a `RowBuilder` does: `lengths` of positions, or one `row`."""

    method: str
    arguments: tuple[Any, ...]

    @property
    def positions(self) -> list[int]:
        """Positions of the samples that it concerns."""
        if self.method == "row":
            first, slots, _ = self.arguments
            return [first + slot for slot in slots]
        return list(self.arguments[0])


def start_server() -> None:
    """Start what worker processes are forked from, unless it runs; returns at once.

    It imports for some seconds, which is why a training starts it before it builds its model.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    fork_server.start(["llava_steps.data.loader.preload"])


def perform(builder: RowBuilder, task: Task) -> Any:
    """The result of a task: a list of lengths, or a MicroBatch."""
    return getattr(builder, task.method)(*task.arguments)


@dataclass
class _Worker:
    process: Any
    line: socket.socket
    tasks: dict[int, Task] = field(default_factory=dict)
    """What it was given, by ticket; it works on the first."""
    beats: int = 0
    silent: float = 0.0
    """Seconds, seen by us, since it began its last sample."""


class Workers:
    """Processes that perform tasks for one thread of this process.

    Args:
        builder: what performs the tasks.
        count: processes, at least 1.
        patience: seconds after which a worker that begins no further sample is given up.
    """

    def __init__(self, builder: RowBuilder, count: int, patience: float) -> None:
        self._builder = builder.without_encoders()
        self._patience = patience
        self._waiting: deque[tuple[int, Task]] = deque()
        self._tickets = 0
        self._seen = time.monotonic()
        start_server()
        context = multiprocessing.get_context("forkserver")
        self._board = context.RawArray(ctypes.c_int64, 2 * count)
        self.workers: list[_Worker] = []
        for number in range(count):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            arguments = (theirs, self._builder, self._board, number)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.workers.append(_Worker(process, ours))

    def submit(self, task: Task) -> int:
        """Have a task performed; returns its ticket."""
        self._tickets += 1
        self._waiting.append((self._tickets, task))
        self._hand_out()
        return self._tickets

    def _hand_out(self) -> None:
        while self._waiting:
            worker = min(self.workers, key=lambda w: len(w.tasks))
            if len(worker.tasks) == _DEPTH:
                return
            ticket, task = self._waiting.popleft()
            worker.tasks[ticket] = task
            message = json.dumps([ticket, task.method, task.arguments]).encode()
            try:
                worker.line.send(message)
            except OSError:
                raise self._died(worker) from None

    def results(self, wake: int) -> list[tuple[int, Any]]:
        """(ticket, result) of tasks that are done; waits for one, or until `wake` can be read.

        Raises:
            StepError: the error of a task (of its class), or a worker died or hangs.
        """
        lines: dict[Any, _Worker] = {worker.line: worker for worker in self.workers}
        ends = {worker.process.sentinel: worker for worker in self.workers}
        ready = wait([wake, *lines, *ends], timeout=_TICK)
        results = [self._receive(lines[source]) for source in ready if source in lines]
        self._hand_out()
        if not results:
            for source in ready:
                if source in ends:
                    raise self._died(ends[source])
        self._check_board()
        return results

    def _receive(self, worker: _Worker) -> tuple[int, Any]:
        space = socket.CMSG_LEN(array.array("i").itemsize)
        try:
            message, sent, _, _ = worker.line.recvmsg(_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            message, sent = b"", []
        if not message:
            raise self._died(worker)
        ticket, error, result = json.loads(message)
        del worker.tasks[ticket]
        if error is not None:
            kinds = {kind.__name__: kind for kind in _kinds(StepError)}
            raise kinds[error](result)
        for _, _, data in sent:
            (descriptor,) = array.array("i", data)
            try:
                return ticket, wire.from_file(descriptor)
            finally:
                os.close(descriptor)
        return ticket, result

    def _check_board(self) -> None:
        """Count how long each busy worker has been silent.

        Only time in which this process was running counts, so that a job which is suspended as a
        whole and continued is not given up.
        """
        now = time.monotonic()
        passed = min(now - self._seen, 2 * _TICK)
        self._seen = now
        for number, worker in enumerate(self.workers):
            beats = self._board[2 * number]
            moved = beats != worker.beats or not worker.tasks
            worker.silent = 0.0 if moved else worker.silent + passed
            worker.beats = beats
        # Others may wait for the same storage, or for a processor: the first to stall is named.
        worker = max(self.workers, key=lambda worker: worker.silent)
        if worker.silent > self._patience:
            number = self.workers.index(worker)
            raise StepError(
                f"loader worker {number} (process {worker.process.pid}) has been silent for "
                f"{self._patience:g} s {self._held(number)}; check the storage, or raise "
                "loader_timeout"
            )

    def _died(self, worker: _Worker) -> StepError:
        worker.process.join(2)
        code = worker.process.exitcode
        number = self.workers.index(worker)
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else "ended"
        return StepError(
            f"loader worker {number} (process {worker.process.pid}) {how} "
            f"{self._held(number)}; if memory ran out, lower num_workers"
        )

    def _held(self, number: int) -> str:
        """Which sample a worker has begun; all of its task when it has not begun one."""
        tasks = list(self.workers[number].tasks.values())
        if not tasks:
            return "before it began a sample"
        position = self._board[2 * number + 1]
        positions = [position] if position != _NOTHING else tasks[0].positions
        return "while it prepared " + ", ".join(self._name(position) for position in positions)

    def _name(self, position: int) -> str:
        """Tar and key of a sample."""
        corpus = self._builder.corpus
        ref = corpus[position]
        try:
            return corpus.where(ref, corpus.raw(ref, images=False))
        except StepError as error:
            return f"a sample that cannot be read here either ({error})"

    def close(self) -> None:
        """End the workers, also those that are stopped."""
        for worker in self.workers:
            worker.line.close()
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()


def _kinds(base: type[StepError]) -> list[type[StepError]]:
    return [base, *(kind for child in base.__subclasses__() for kind in _kinds(child))]


def _work(line: socket.socket, builder: RowBuilder, board: Any, number: int) -> None:
    """Main function of a worker process."""
    torch.set_num_threads(1)

    def watch(position: int) -> None:
        board[2 * number + 1] = position
        board[2 * number] += 1

    builder.watch = watch
    while message := line.recv(_MESSAGE):
        ticket, method, arguments = json.loads(message)
        watch(_NOTHING)
        try:
            result, error = perform(builder, Task(method, tuple(arguments))), None
        except StepError as failure:
            result, error = str(failure), _named(failure).__name__
        except Exception:
            text = traceback.format_exc()[-_TRACEBACK:]
            result, error = f"the loader failed:\n{text}", StepError.__name__
        watch(_NOTHING)
        try:
            _send(line, ticket, error, result)
        except BrokenPipeError:
            return


def _send(line: socket.socket, ticket: int, error: str | None, result: Any) -> None:
    if error is not None or isinstance(result, list):
        line.send(json.dumps([ticket, error, result]).encode())
        return
    descriptor = wire.to_file(result)
    try:
        socket.send_fds(line, [json.dumps([ticket, None, None]).encode()], [descriptor])
    finally:
        os.close(descriptor)


def _named(error: StepError) -> type[StepError]:
    """The class under which an error is passed on: one of core/errors.py."""
    return next(
        kind
        for kind in type(error).__mro__
        if kind.__module__ == StepError.__module__ and issubclass(kind, StepError)
    )
