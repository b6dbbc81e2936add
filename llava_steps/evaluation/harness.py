"""External evaluation harnesses, which run in their own environments."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.core.process import die_with_parent
from llava_steps.store.step import Context

TAIL = 12
"""Lines of a harness's output that an error shows."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PACKAGES = {"lmms_eval": "lmms_eval", "llm_jp_eval_mm": "eval_mm"}
"""Section of the configuration -> package."""
_BESIDE = {"lmms_eval": ("decord",), "eval_mm": ("transformers", "PIL")}
"""Packages used here that an installation without extras may lack."""
_PROBE = (
    "import importlib.metadata as m, importlib.util as u, json, sys\n"
    "missing = [name for name in sys.argv[1:] if u.find_spec(name) is None]\n"
    "if missing: sys.exit('missing: ' + ', '.join(missing))\n"
    "import torch\n"
    "print(json.dumps([m.version(sys.argv[1]), torch.cuda.is_available()]))"
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


def begin(section: str, tasks: Collection[str], python: str, ctx: Context) -> tuple[Harness, Path]:
    """The harness of a section, and the log file for its output.

    Raises:
        ConfigError: no tasks are given, or the harness is not installed.
    """
    name = section.replace("_", "-")
    if not tasks:
        raise ConfigError(f"{section}.tasks: name at least one task of {name}")
    harness = find(PACKAGES[section], section, python)
    log = ctx.work / f"{section}.log"
    ctx.log.info("%s %s in %s: %s", name, harness.version, harness.python, ", ".join(tasks))
    ctx.log.info("its output is written to %s", log)
    return harness, log


def find(package: str, section: str, python: str = "") -> Harness:
    """The harness `package` in the environment of `python`, or in this one if that is empty.

    Raises:
        ConfigError: it is not installed there, or that Python does not run.
    """
    python = python or sys.executable
    hint = (
        f"install it into an environment and set {section}.python to that environment's Python, or "
        f"leave {section}.tasks empty"
    )
    try:
        probe = subprocess.run(
            [python, "-c", _PROBE, package, *_BESIDE[package]],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise ConfigError(f"{section}.python: {python}: {error}; {hint}") from error
    try:
        version, cuda = json.loads(probe.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = probe.stderr.strip().splitlines()[-1:]
        detail = f": {last[0]}" if last else ""
        raise ConfigError(
            f"{section}.tasks: {python} has no working {package}{detail}; {hint}"
        ) from None
    return Harness(package, python, version, cuda)


def run(
    harness: Harness,
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run the harness's Python with `arguments`; its output goes to the file `log`.

    An error or signal while waiting kills the harness and all of its processes. So does the end of
    a step that is killed.

    Returns:
        Its output, without colours.

    Raises:
        InputError: it failed; the message ends with its last lines.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            [harness.python, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    output = _COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace"))
    if code:
        raise failure(harness, f"ended with code {code}", output, log)
    return output


def failure(harness: Harness, what: str, output: str, log: Path) -> InputError:
    """An error that shows the last lines of the harness's output."""
    lines = [line for line in output.replace("\r", "\n").splitlines() if line.strip()]
    return InputError(
        f"{harness.package} {harness.version} {what}; its output is in {log}, the last lines "
        "are:\n" + "\n".join(lines[-TAIL:])
    )


def summary(
    harness: Harness, tasks: Sequence[str], scores: Sequence[Score], section: str
) -> dict[str, Any]:
    """The scores as the report shows and the manifest keeps them.

    Raises:
        InputError: a task has no score.
    """
    scored = {score.task for score in scores}
    missing = [task for task in tasks if task not in scored]
    if missing or not scored:
        raise InputError(
            f"{section}.tasks: {harness.package} {harness.version} reported no number for "
            f"{', '.join(missing) or 'any task'}; see its files in raw/"
        )
    rows = [asdict(score) for score in scores]
    return {"harness": harness.package, "version": harness.version, "scores": rows}


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are finite numbers, and not bools."""
    return {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
