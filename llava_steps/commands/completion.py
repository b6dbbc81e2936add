"""Print a script with which the shell completes `llava-steps`: names, flags and their choices.

    source <(llava-steps completion bash)     for this shell
    source <(llava-steps completion zsh)      the same in zsh, after compinit

The script is complete, so TAB starts no Python. Keep it in a file that ~/.bashrc, ~/.zshrc or
~/.tcshrc sources, and print it again after an update.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import shtab

from llava_steps.pipeline import command_line
from llava_steps.settings import cli
from llava_steps.settings.fields import facts

SHELLS = ("bash", "zsh", "tcsh")


def main(arguments: list[str] | None = None) -> int:
    """Print the script; returns the exit code."""
    print(script(parser().parse_args(arguments).shell))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.tool_parser("completion", __doc__)
    made.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    return made


def script(shell: str) -> str:
    """The script for one of `SHELLS`."""
    made = shtab.complete(whole(with_dashes=shell != "bash"), shell)
    return f"{made}\n{BASH}" if shell == "bash" else made


def whole(with_dashes: bool) -> argparse.ArgumentParser:
    """One parser of all steps and tools, each with its own flags.

    `with_dashes` lists each name in its other spelling too; `BASH` has code for that instead.
    """
    made = argparse.ArgumentParser(prog="llava-steps")
    made.add_argument("--version", action="version", version="")
    names = made.add_subparsers()
    for name, module in command_line.commands().items():
        parent = command_line.parser_of(name)
        for action in parent._actions:  # argparse offers no other way to ask
            if action.type is Path or action.dest in _sources(module):
                is_directory = "dir" in f"{action.dest} {action.metavar}".lower()
                action.complete = (  # type: ignore[attr-defined]
                    shtab.DIRECTORY if is_directory else shtab.FILE
                )
        sentence = (parent.description or "").partition("\n")[0]
        dashed = [name.replace("_", "-")] if with_dashes and "_" in name else []
        names.add_parser(
            name,
            aliases=dashed,
            parents=[parent],
            add_help=False,
            description=sentence,
            help=sentence,
        )
    return made


def _sources(module: str) -> set[str]:
    """Settings of a step that name files or directories; none of a tool."""
    step = getattr(importlib.import_module(module), "STEP", None)
    fields = step.config.model_fields if step else {}
    return {key for key, info in fields.items() if facts(info).role == "source"}


BASH = r"""
# bash makes a word of "=", as in --stage=1: shtab's function is asked without it.
_llava_steps() {
    local word words=() index
    for ((index = 0; index <= COMP_CWORD; index++)); do
        word=${COMP_WORDS[index]}
        if [[ $word != "=" ]]; then
            words+=("$word")
        elif ((index == COMP_CWORD)); then
            words+=("")
        fi
    done
    # A name may be spelled with dashes, as in hf-to-megatron.
    local dashed=
    if [[ ${words[1]} == [a-z]*-* ]]; then
        dashed=yes
        words[1]=${words[1]//-/_}
    fi
    local COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1))
    _shtab_llava_steps
    if [[ $dashed && $COMP_CWORD == 1 ]]; then
        COMPREPLY=("${COMPREPLY[@]//_/-}")
    fi
}
complete -o bashdefault -o default -F _llava_steps llava-steps"""
