"""From raw images and questions to a Hugging Face LLaVA checkpoint, one sealed step at a time."""

from __future__ import annotations

import sys
from types import TracebackType

__version__ = "0.1.0"


def _tell_of_another_python(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What a command ends with in a Python that the project is not installed for."""
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(__name__):
        print(
            f"{error}, which llava-steps needs, for {sys.executable}; use the environment that it "
            "is installed in (after make demo: . .venv/bin/activate), or install it here: "
            "pip install -c constraints.txt -e .",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[0] == "-m":  # python -m llava_steps.COMMAND is being started
    sys.excepthook = _tell_of_another_python
