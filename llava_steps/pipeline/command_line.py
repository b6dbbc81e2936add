"""The commands of `llava-steps`: the steps in the order of a run, then the tools beside it."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from pathlib import Path

import llava_steps
from llava_steps.settings.steps import modules
from llava_steps.store import run

PACKAGE = Path(llava_steps.__file__).parent
TOOLS = "commands"
"""Package whose modules are the tools."""


def steps() -> dict[str, str]:
    """Name -> module of every step, in the order of a run."""
    return {module.rpartition(".")[2]: module for module in modules()}


def tools() -> dict[str, str]:
    """Name -> module of every tool."""
    tool_modules = pkgutil.iter_modules([str(PACKAGE / TOOLS)])
    return {item.name: f"{llava_steps.__name__}.{TOOLS}.{item.name}" for item in tool_modules}


def commands() -> dict[str, str]:
    """Name -> module of everything that `llava-steps` runs."""
    return steps() | tools()


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser whose text `llava-steps NAME --help` prints; imports the module."""
    module = importlib.import_module(commands()[name])
    if name in steps():
        return run.parser(module.STEP, module.__name__)
    made: argparse.ArgumentParser = module.parser()
    return made
