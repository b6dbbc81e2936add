"""llava-steps: one command for the steps of a run and for the other tools."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import llava_steps
from llava_steps.core.errors import ConfigError, report_error
from llava_steps.pipeline import command_line
from llava_steps.store.run import execute

PROG = "llava-steps"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in a shell."""


def run() -> NoReturn:
    """Entry point of `llava-steps` and `python -m llava_steps`."""
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()  # raises here, not at exit, if the reader has ended
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def main(arguments: Sequence[str]) -> int:
    """Run the step or tool that the first argument names; returns the exit code."""
    if not arguments or arguments[0].startswith("-"):
        parser().parse_args(arguments)
        print(listing())
        return 0
    try:
        return dispatch(arguments[0], arguments[1:])
    except Exception as error:
        return report_error(PROG, error)


def dispatch(word: str, arguments: Sequence[str]) -> int:
    """Run a step or tool, named with underscores or dashes; returns its exit code.

    Raises:
        ConfigError: neither a step nor a tool has this name.
    """
    steps, known = command_line.steps(), command_line.commands()
    name = word.replace("-", "_")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"`{PROG} --help` lists them"
        raise ConfigError(f"{word!r} is not a step or a tool; {hint}")
    module = importlib.import_module(known[name])
    if name in steps:
        return execute(module.STEP, arguments)
    return int(module.main([*arguments]))


def parser() -> argparse.ArgumentParser:
    """The command line up to the name of a step or tool."""
    made = argparse.ArgumentParser(
        prog=PROG,
        usage="%(prog)s STEP|TOOL ...",
        description=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"{PROG} {llava_steps.__version__}")
    return made


def listing() -> str:
    """Steps in the order of a run, then the tools, with a line for each."""
    return "\n".join(
        [
            "Steps, in the order of a run; `snakemake --profile local all` runs them all:",
            *_lines(command_line.steps()),
            "Tools:",
            *_lines(command_line.tools()),
            f"`{PROG} NAME --help` explains each.",
        ]
    )


def _lines(commands: Mapping[str, str]) -> list[str]:
    """Names and first sentences, read without importing what the commands need."""
    lines = []
    for name, module in commands.items():
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:16s} {text.partition(chr(10))[0]}")
    return lines


if __name__ == "__main__":
    run()
