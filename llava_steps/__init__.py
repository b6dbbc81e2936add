"""From raw images and questions to a Hugging Face LLaVA checkpoint, one sealed step at a time."""

from __future__ import annotations

import os
import select
import sys
from types import TracebackType

__version__ = "0.1.0"


def _tell_without_a_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What a command ends with that is no mistake in its code.

    A Python that the project is not installed for, Ctrl-C, and a reader of its output that has
    gone, as `head` does.
    """
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(__name__):
        print(
            f"{error}, which llava-steps needs, for {sys.executable}; use the environment that it "
            "is installed in (after make demo: . .venv/bin/activate), or install it here: "
            "pip install -c constraints.txt -e .",
            file=sys.stderr,
        )
    elif isinstance(error, BrokenPipeError) and _unread():
        # What is left in the buffer would be tried once more at the very end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif not isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def _unread() -> bool:
    """Whether nobody reads the standard output any more."""
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    return bool(asked.poll(0))


# A command is being started: python -m llava_steps..., or the script that the package installs.
if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) == "llava-steps":
    sys.excepthook = _tell_without_a_traceback
