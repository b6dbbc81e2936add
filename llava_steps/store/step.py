"""What a step declares, and what its `run` gets."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from llava_steps.core.log import Progress
from llava_steps.settings.fields import StepConfig
from llava_steps.store.hub import Hub
from llava_steps.store.store import Input

C = TypeVar("C", bound=StepConfig)


@dataclass(frozen=True)
class Context:
    """What a step's `run` gets besides its settings."""

    entry: Path
    """Store entry: the payload goes here; empty but for `work`, unless the step resumes."""
    inputs: Mapping[str, Input]
    """Resolved inputs by field name; fields that were left empty are absent."""
    log: logging.Logger
    work: Path
    """Bookkeeping directory of the attempts; not part of the payload."""
    fingerprint: str = ""
    until_sealed: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Entered here: left once the value is sealed, or with the error that prevented it."""
    results: str = ""
    """Where the value will be shown, relative to `entry`."""
    again: bool = False
    """Whether a value that is sealed already is to be computed again."""

    def progress(self, what: str, total: int) -> Progress:
        """A progress bar or, without a terminal, progress lines."""
        return Progress(self.log, what, total)


@dataclass(frozen=True)
class Step(Generic[C]):
    """A step of the pipeline: a pure function of its settings and inputs to a directory.

    It declares its result and its own functions. Facts about a setting are beside that setting,
    in `llava_steps.settings.fields.Facts`; functions that read data or ask a hub cannot, because
    they need code above the settings.
    """

    name: str | Callable[[C], str]
    config: type[C]
    run: Callable[[Context, C], Mapping[str, Any]]
    """Writes the payload and returns metrics for the manifest."""
    doc: str | None = None
    resumes: bool = False
    """Whether `run` continues from the payload that an earlier attempt left."""
    result_flags: tuple[str, ...] = ("--save-dir",)
    """Names of the flag for the directory that shows the result."""
    volatile: tuple[str, ...] = ()
    """Glob patterns of payload files that differ between equal runs (timings). They describe the
    result, whatever the settings are."""
    resolve: Mapping[str, Callable[[str, Hub], Path]] = field(default_factory=dict)
    """For a source field: from the given text (a hub id, say) to a local path."""
    parts: Mapping[str, Callable[[Path, C], tuple[Path, Iterable[Path]]]] = field(
        default_factory=dict
    )
    """For a source field outside the store: (root, files) that its content consists of."""
    published: Callable[[C], None] = lambda config: None
    """Called after the value was published, whether it was computed or found. This is work of the
    step, such as to remove the shares that it joined; no setting can declare it."""
    follows: Callable[[C], bool] = lambda config: False
    """Whether this process only takes part in a computation that another one leads: it calls `run`
    without a lease and leaves sealing and publishing to the lead."""

    def named(self, config: C) -> str:
        """The name of the step with these settings: its directory in the store."""
        return self.name if isinstance(self.name, str) else self.name(config)
