"""Errors that a step can end with, each with the exit code that the workflow relies on.

| code | class | meaning |
|---|---|---|
| 0 | | done |
| 2 | ConfigError | the configuration or the command line is wrong |
| 3 | InputError | an input file is missing or unusable |
| 4 | IntegrityError | an artefact disagrees with its manifest, or a mapping is incomplete |
| 5 | LockedError | a run of the same name is alive, or the store entry was taken over |
| 6 | DivergedError | training produced non-finite values beyond its budget |
| 75 | StoppedError | stopped with its state saved; run it again (EX_TEMPFAIL) |

The message is for the person who has to fix it: name the file, the key and what to do.
"""

from __future__ import annotations

import errno
import sys


class StepError(Exception):
    """Base of all errors that a step reports as one line instead of a traceback."""

    exit_code = 1


class ConfigError(StepError):
    """Unknown key, wrong type, contradiction between options."""

    exit_code = 2


class InputError(StepError):
    """An input is missing, unreadable or not what the step can use."""

    exit_code = 3


class IntegrityError(StepError):
    """Bytes, shapes or names are not what a manifest or mapping promises."""

    exit_code = 4


class LockedError(StepError):
    """A live lease of another process covers the directory."""

    exit_code = 5


class DivergedError(StepError):
    """Loss or gradients are not finite and no budget is left to skip them."""

    exit_code = 6


class StoppedError(StepError):
    """A signal or time limit ended the step after its state was saved."""

    exit_code = 75


BY_CODE: dict[int, type[StepError]] = {
    kind.exit_code: kind
    for kind in (
        StepError,
        ConfigError,
        InputError,
        IntegrityError,
        LockedError,
        DivergedError,
        StoppedError,
    )
}
"""The error that an exit code stands for."""

_ENVIRONMENT = {
    errno.ENOSPC: "free some space there and run again",
    errno.EDQUOT: "free some of your quota there and run again",
    errno.EROFS: "make it writable or choose another directory",
    errno.EACCES: "change its permissions or choose another directory",
    errno.EPERM: "change its permissions or choose another directory",
    errno.ENOTDIR: "a part of this path is a file; choose another path",
    errno.EIO: "the disk or its network failed; check it before you run again",
}


def environment_error(error: BaseException | None) -> InputError | None:
    """The error to report when disk, quota or permissions are to blame; None for any other.

    The causes of `error` are searched too, because libraries wrap a full disk in their own errors.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
            where = f"{error.filename}: " if error.filename else ""
            return InputError(f"{where}{error.strerror}; {_ENVIRONMENT[error.errno]}")
        error = error.__cause__ or error.__context__
    return None


def reason(error: Exception) -> str:
    """What an error says, without its number and the path, which a message names already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return str(error)


def report_error(command: str, error: Exception) -> int:
    """Print the error of a command outside the workflow as one line; returns its exit code.

    Raises:
        Exception: `error` itself, when it is neither a `StepError` nor an environment error: a bug.
    """
    known = error if isinstance(error, StepError) else environment_error(error)
    if known is None:
        raise error
    print(f"{command}: {known}", file=sys.stderr)
    return known.exit_code
