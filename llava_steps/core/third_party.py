"""Errors of libraries as one line: what was to be done, with which path, and the cause."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from llava_steps.core.errors import InputError, StepError, environment_error

LONGEST = 300
"""Characters of a library's message that are shown."""


def brief(error: BaseException) -> str:
    """A library's message in one line, of limited length; the kind of error if it has none."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


@contextlib.contextmanager
def reported(what: str, advice: str = "", instead: str = "") -> Iterator[None]:
    """Within it, an error of a library becomes `InputError("<what>: <its message>; <advice>")`.

    `instead` replaces a message of the library that is known to mislead. Errors of steps, of memory
    and of the environment (a full disk) stay what they are.
    """
    try:
        yield
    except (StepError, MemoryError):
        raise
    except Exception as error:
        if environment_error(error) is not None:
            raise
        cause = instead or brief(error)
        raise InputError(f"{what}: {cause}" + (f"; {advice}" if advice else "")) from error
