"""The loader's batches, the next one taken from it while the GPU still works on the last.

Taking a batch, and copying its pixels to memory that the GPU reads by itself, costs the host some
milliseconds, in which the GPU would stand still once a step. The state of the loader is that after
the batch that was given out last: what was only fetched has not been trained on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from llava_steps.data.loader.batch import MicroBatch
from llava_steps.data.loader.loader import TrainLoader

Busy = Callable[[], contextlib.AbstractContextManager[Any]]


class Prefetch:
    """Batches of `loader`. `busy` is entered while one is waited for."""

    def __init__(self, loader: TrainLoader, busy: Busy = contextlib.nullcontext) -> None:
        self._loader, self._busy = loader, busy
        self._batches = iter(loader)
        self._state = loader.state()
        self._fetched: tuple[list[MicroBatch] | Exception, Any, Any] | None = None

    def fetch(self) -> None:
        """Take the next batch now. To be called when all work of a step is on its way to the GPU;
        without a GPU nothing is gained, and nothing done. What goes wrong is raised by `next`.
        """
        if self._fetched is not None or not torch.cuda.is_available():
            return
        batch: list[MicroBatch] | Exception
        start, end = _event(), _event()
        start.record()
        try:
            batch = [_pinned(row) for row in self._take()]
        except Exception as error:
            batch = error
        end.record()
        self._fetched = batch, start, end

    def next(self) -> tuple[list[MicroBatch], float]:
        """The next batch, and the seconds that training stood still for it: the GPU's, where it
        was fetched before.
        """
        if self._fetched is None:
            began = time.monotonic()
            batch = self._take()
            lost = time.monotonic() - began
        else:
            (fetched, start, end), self._fetched = self._fetched, None
            if isinstance(fetched, Exception):
                raise fetched
            batch = fetched
            end.synchronize()
            lost = start.elapsed_time(end) / 1000
        self._state = self._loader.state()
        return batch, lost

    def state(self) -> dict[str, Any]:
        """The loader's, after the batch that was given out last."""
        return self._state

    def _take(self) -> list[MicroBatch]:
        with self._busy():
            return next(self._batches)


def _pinned(row: MicroBatch) -> MicroBatch:
    if row.pixel_values is None:
        return row
    return replace(row, pixel_values=row.pixel_values.pin_memory())


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
