"""From raw images and questions to a Hugging Face LLaVA checkpoint, one sealed step at a time."""

from __future__ import annotations

import os
import select
import sys
from types import TracebackType

__version__ = "0.2.0.dev0"


def _report_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback only for bugs.

    Not for a Python without this project's packages, Ctrl-C, or a reader of the output that has
    ended, as `head` does.
    """
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(__name__):
        print(
            f"{error}, which llava-steps needs, for {sys.executable}; activate the environment of "
            "llava-steps (after make demo: . .venv/bin/activate), or install llava-steps here: "
            "pip install -c constraints.txt -e .",
            file=sys.stderr,
        )
    elif isinstance(error, BrokenPipeError) and _unread():
        # Python would write the rest of the buffer once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif not isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def _unread() -> bool:
    """Whether the reader of the standard output has ended."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


# A command starts: python -m llava_steps..., or the script that the package installs.
if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) == "llava-steps":
    sys.excepthook = _report_uncaught
