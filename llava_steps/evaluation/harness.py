"""Evaluation harnesses of others, which run in an environment of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_steps.core.errors import ConfigError, InputError

TAIL = 12
"""Lines of a harness's output that an error shows."""
_PROBE = (
    "import importlib.metadata as m, importlib.util as u, json, sys; name = sys.argv[1]\n"
    "if u.find_spec(name) is None: sys.exit(3)\n"
    "import torch\n"
    "print(json.dumps([m.version(name), torch.cuda.is_available()]))"
)


@dataclass(frozen=True)
class Harness:
    """A package that evaluates, and the Python that it is installed for."""

    package: str
    python: str
    version: str
    cuda: bool
    """Whether its torch sees a GPU."""


@dataclass(frozen=True)
class Score:
    """One number of a task."""

    task: str
    metric: str
    value: float
    stderr: float | None = None


def find(package: str, section: str, python: str = "") -> Harness:
    """The harness `package` in the environment of `python`; of this one when that is empty.

    Raises:
        ConfigError: it is not installed there, or there is no such Python.
    """
    python = python or sys.executable
    hint = (
        f"install it into an environment, name that environment's Python in {section}.python, or "
        f"leave {section}.tasks empty"
    )
    try:
        found = subprocess.run(
            [python, "-c", _PROBE, package], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ConfigError(f"{section}.python: {python}: {error}; {hint}") from error
    try:
        version, cuda = json.loads(found.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = found.stderr.strip().splitlines()[-1:] if found.returncode != 3 else []
        detail = f": {said[0]}" if said else ""
        raise ConfigError(
            f"{section}.tasks: {python} has no {package} that works{detail}; {hint}"
        ) from None
    return Harness(package, python, version, cuda)


def run(harness: Harness, arguments: Sequence[str], log: Path) -> None:
    """Run the harness's Python with `arguments`; what it says goes to the file `log`.

    Whatever ends the wait, a signal to the step say, ends the harness and all of its processes.

    Raises:
        InputError: it failed; the message ends with its last lines.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(
            [harness.python, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code:
        said = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        raise InputError(
            f"{harness.package} {harness.version} ended with code {code}; all it said is in {log}, "
            "the last lines are:\n" + "\n".join(said[-TAIL:])
        )


def summary(
    harness: Harness, asked: Sequence[str], scores: Sequence[Score], section: str
) -> dict[str, Any]:
    """What the report shows and the manifest keeps.

    Raises:
        InputError: a task that was asked for has no score.
    """
    scored = {score.task for score in scores}
    if silent := [task for task in asked if task not in scored]:
        raise InputError(
            f"{section}.tasks: {harness.package} {harness.version} gave no number for "
            f"{', '.join(silent)}; see its own files in raw/"
        )
    rows = [asdict(score) for score in scores]
    return {"harness": harness.package, "version": harness.version, "scores": rows}


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are numbers; a bool is none."""
    return {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
