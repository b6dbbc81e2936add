"""Calls of `python -m MODULE` in forks of a process that has imported megatron already.

Importing torch and megatron takes longer than most of what the tests ask of a training. Each line
on stdin is a call, made in a fork of this process; where the launcher of a training would start
its workers, they are forks of the launcher. Nothing of a call is seen by the next. What is about
processes themselves (kills, signals, stops) starts real ones instead.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from tests.helpers.patience import PATIENCE

WORKER = "llava_steps.training.worker"
PRELOAD = (
    "llava_steps.launch.launch",
    "llava_steps.training.loop",
    "llava_steps.conversion.convert",
    "transformers.models.auto.processing_auto",
    "transformers.models.llava.processing_llava",
)


def run(module: str, arguments: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """What `python -m module arguments` would do in this environment; the process ends with it."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        tempfile.tempdir = None  # found out anew from TMPDIR
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Forked(subprocess.Popen[bytes]):
    """A training worker as a fork of this process, a child of it like any other."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        _, _, _, _, _, env, _, _, _, *pipes = rest
        if args[1:3] != ["-m", WORKER] or any(end != -1 for end in pipes[:6]):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            run(WORKER, args[3:], env)
        self._child_created = True


def call(request: dict[str, Any]) -> NoReturn:
    """One call, in this fork."""
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND), number)
        os.chdir(request["cwd"])
        sys.path.insert(0, request["cwd"])
        launch = sys.modules["llava_steps.launch.launch"]
        launch.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": Forked})  # type: ignore[attr-defined]
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    run(request["module"], request["arguments"], request["env"])


def serve() -> None:
    """Answer each request with the process id of its call, and then its exit code."""
    from llava_steps.model import cpu_shim

    cpu_shim.import_megatron()
    for name in PRELOAD:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            call(json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


@functools.cache
def server() -> subprocess.Popen[bytes]:
    """The one of this test process."""
    env = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.zygote"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2], env=env, bufsize=0,
    )  # fmt: skip
    atexit.register(process.wait)
    atexit.register(process.kill)
    return process


def warm(
    module: str, arguments: Sequence[str], cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` of `python -m module`, output as text."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        request = {
            "module": module, "arguments": arguments, "cwd": str(cwd), "env": dict(env),
            "out": out.name, "err": err.name,
        }  # fmt: skip
        process = server()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        child = int(process.stdout.readline())
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            os.killpg(child, signal.SIGKILL)
            raise AssertionError(f"{module} {arguments}: still running\n{err.read()}")
        code = int(process.stdout.readline())
        return subprocess.CompletedProcess([module, *arguments], code, out.read(), err.read())


if __name__ == "__main__":
    serve()
