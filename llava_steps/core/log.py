"""Log lines and progress: live on a terminal, plain lines in a file.

`Progress` shows a bar with rate and remaining time on a terminal; elsewhere it logs a line every
few seconds, so that several steps writing to one log stay readable.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

from llava_steps.core.errors import StepError
from llava_steps.core.format import duration

LINE_EVERY = 10.0
"""Seconds between progress lines where there is no terminal."""

PROGRESS = "LLAVA_STEPS_PROGRESS"
"""Environment variable: `lines` asks for lines on a terminal too. The workflow sets it, because
bars of several steps at a time would write over each other."""


KNOWN_WARNINGS = (
    # megatron-core warns at import where they are not installed; the local layer spec and torch's
    # own optimizer do not need them.
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    # Defaults and calls inside megatron-core, torch's checkpointing and each other.
    "full scope is deprecated",
    "`load_state_dict` is deprecated",
    "`torch.distributed",
    "torch.distributed is disabled, unavailable or uninitialized",
    "Please use DTensor instead",
    # The distributed optimizer reads views of parameters, whose gradient it keeps itself.
    "The .grad attribute of a Tensor that is not a leaf",
)
"""Beginnings of library warnings that users of the steps can do nothing about."""


def ignore_known_warnings() -> None:
    """Keep `KNOWN_WARNINGS` out of the log, and only these."""
    for text in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(text))


class _Stoppable(logging.Handler):
    """A handler in which a stop signal is not lost, although logging swallows errors."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Report an error of the log; raise one that a signal raised while a line was written."""
        if isinstance(error := sys.exc_info()[1], StepError):
            raise error
        super().handleError(record)


class _Lines(_Stoppable, logging.StreamHandler[TextIO]):
    pass


class _FileLines(_Stoppable, logging.FileHandler):
    pass


def logger(name: str, file: Path | None = None) -> logging.Logger:
    """The logger of a step: to stderr and, if given, appended to `file`."""
    log = logging.getLogger(f"llava_steps.{name}")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    plain = logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [_Lines(sys.stderr)]
    if file is not None:
        handlers.append(_FileLines(file))
    for handler in handlers:
        handler.setFormatter(plain)
        log.addHandler(handler)
    return log


class Progress:
    """Progress of one long task; use as a context manager, call `advance` and `note`."""

    def __init__(self, log: logging.Logger, what: str, total: int, done: int = 0) -> None:
        self._log, self._what, self._total, self._done = log, what, total, done
        self._from, self._shown = done, -1
        self._note = ""
        self._bar: Any = None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and os.environ.get(PROGRESS) != "lines":
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeRemainingColumn,
            )
            from rich.progress import (
                Progress as Bar,
            )

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._what, total=self._total, completed=self._done, note="", rate=""
            )
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if error is None and self._shown < self._done:
            self._line()

    def advance(self, count: int = 1, note: str = "", due: bool | None = None) -> None:
        """`count` more are done; `note` is shown after the bar.

        Without a terminal a line is due every few seconds, unless `due` says otherwise.
        """
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            rate = f"{self._rate(time.monotonic()):.1f}/s"
            self._bar.update(self._task, completed=self._done, note=self._note, rate=rate)
        elif time.monotonic() - self._last >= LINE_EVERY if due is None else due:
            self._line()

    def _line(self) -> None:
        self._last, self._shown = time.monotonic(), self._done
        rate = self._rate(self._last)
        left = (self._total - self._done) / rate if rate else 0.0
        self._log.info(
            "%s %d/%d, %.1f/s, %s left %s",
            self._what,
            self._done,
            self._total,
            rate,
            duration(left),
            self._note,
        )

    def _rate(self, now: float) -> float:
        elapsed = now - self._start
        return (self._done - self._from) / elapsed if elapsed > 0 else 0.0
