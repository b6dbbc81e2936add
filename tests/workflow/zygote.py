"""Snakemake imported once: every line on stdin is a call, made in a fork of this process.

Importing Snakemake takes longer than most of what the tests ask of it. A fork is as good as a new
process: nothing of the project is imported here, and nothing of one call is seen by the next.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from typing import Any, NoReturn

from snakemake.cli import main


def call(request: dict[str, Any]) -> NoReturn:
    """`python -m snakemake` with these arguments, in this directory and environment."""
    code = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for file, number in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(file, number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.path.insert(0, request["cwd"])
        sys.argv = ["snakemake", *request["arguments"]]
        main(sys.argv[1:])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()  # as the end of a process of its own would
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Answer each request with the exit code of its call."""
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            call(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
