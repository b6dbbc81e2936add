"""python -m llava_steps: the commands that there are, with a line for each."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from pathlib import Path

from llava_steps.pipeline.steps import MODULES
from llava_steps.settings import cli


def main(arguments: list[str] | None = None) -> int:
    """Print the list; returns the exit code."""
    parser().parse_args(arguments)
    print(listing())
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line, which takes nothing."""
    return argparse.ArgumentParser(
        prog="python -m llava_steps",
        description=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def listing() -> str:
    """Steps in the order of a run, then the other commands."""
    steps = list(dict.fromkeys(MODULES.values()))
    others = [command for command in cli.commands() if command not in steps]
    return "\n".join(
        [
            "Steps of a run, in their order; `snakemake --profile local all` runs them all:",
            *map(_line, steps),
            "Beside a run:",
            *map(_line, others),
            "`python -m llava_steps.NAME --help` explains each.",
        ]
    )


def _line(command: str) -> str:
    """Name and first sentence, read without importing what the command needs."""
    spec = importlib.util.find_spec(command)
    assert spec is not None and spec.origin is not None
    told = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return f"  {command.rpartition('.')[2]:16s} {told.splitlines()[0]}"


if __name__ == "__main__":
    sys.exit(main())
