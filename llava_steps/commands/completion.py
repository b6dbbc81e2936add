"""A script for the shell that completes commands, their flags and the choices of flags.

    source <(llava-steps completion bash)     for this shell
    source <(llava-steps completion zsh)      the same in zsh, after compinit

After that `python -m llava_steps.` and TAB show the commands. The script holds all there is to
know, so that TAB starts no Python: keep it in a file that ~/.bashrc or ~/.zshrc sources, and print
it again after an update.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Iterator
from typing import NamedTuple

from llava_steps.settings import cli
from llava_steps.store import run

PYTHONS = ("python", "python3", *(f"python3.{minor}" for minor in range(11, 15)))


def main(arguments: list[str] | None = None) -> int:
    """Print the script; returns the exit code."""
    given = parser().parse_args(arguments)
    print(script(given.shell))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="llava-steps completion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("shell", choices=["bash", "zsh"], help="who is to read the script")
    return made


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser whose text `--help` prints."""
    module = importlib.import_module(command)
    step = getattr(module, "STEP", None)
    made: argparse.ArgumentParser = run.parser(step, command) if step else module.parser()
    return made


class Argument(NamedTuple):
    """What a command takes."""

    flags: tuple[str, ...]
    """Its spellings; none for an argument that has its place."""
    takes: bool
    """Whether a value follows."""
    choices: tuple[str, ...]
    """Values that are possible; empty when any text will do."""


def arguments_of(made: argparse.ArgumentParser) -> Iterator[Argument]:
    """Everything that a command takes, in the order of `--help`."""
    for action in made._actions:  # argparse offers no other way to ask
        choices = tuple(str(choice) for choice in action.choices or () if choice != "")
        yield Argument(tuple(action.option_strings), action.nargs != 0, choices)


def script(shell: str) -> str:
    """The script for `bash` or `zsh`."""
    flags, values = [], []
    for command in cli.commands():
        found = list(arguments_of(parser_of(command)))
        words = " ".join(flag for argument in found for flag in argument.flags)
        flags.append(f"    {command}) echo {shlex.quote(words)} ;;")
        for argument in dict.fromkeys(found):
            if argument.takes:
                keys = "|".join(f'"{command} {flag}"' for flag in argument.flags or ("",))
                values.append(f"    {keys}) echo {shlex.quote(' '.join(argument.choices))} ;;")
    parts = {
        "@MODULES@": " ".join(cli.commands()),
        "@FLAGS@": "\n".join(flags),
        "@VALUES@": "\n".join(values),
        "@PYTHONS@": " ".join(PYTHONS),
    }
    text = BODY + {"bash": BASH, "zsh": ZSH}[shell]
    for mark, content in parts.items():
        text = text.replace(mark, content)
    return text.rstrip()


# zsh runs this as sh with `nounset`; arrays then begin at 0 as in bash.
BODY = r"""# Made by llava-steps completion.

_llava_steps_flags() {
    case "$1" in
@FLAGS@
    esac
}

# The values of a flag, or of what has no flag; none when any text will do. Fails where none is due.
_llava_steps_values() {
    case "$1 $2" in
@VALUES@
    *) return 1 ;;
    esac
}

_llava_steps() {
    local at=1 module word flag prefix offered
    COMPREPLY=()
    while [ "$at" -lt "$COMP_CWORD" ] && [ "${COMP_WORDS[$at]}" != "-m" ]; do
        at=$((at + 1))
    done
    word=${COMP_WORDS[$COMP_CWORD]}
    if [ "$((at + 1))" -eq "$COMP_CWORD" ]; then
        COMPREPLY=( $(compgen -W "@MODULES@" -- "$word") )
        return
    fi
    module=${COMP_WORDS[$((at + 1))]}
    flag=${COMP_WORDS[$((COMP_CWORD - 1))]}
    prefix=
    # bash makes words of their own of "=" and what follows, zsh does not.
    if [ "$word" = "=" ]; then
        word=
    elif [ "$flag" = "=" ]; then
        flag=${COMP_WORDS[$((COMP_CWORD - 2))]}
    else
        case "$word" in
        --*=*)
            flag=${word%%=*}
            prefix="$flag="
            word=${word#*=}
            ;;
        esac
    fi
    case "$word" in
    -*) ;;
    *)
        if offered=$(_llava_steps_values "$module" "$flag"); then
            COMPREPLY=( $(compgen -P "$prefix" -W "$offered" -- "$word") )
            return
        fi
        if offered=$(_llava_steps_values "$module" ""); then
            COMPREPLY=( $(compgen -W "$offered" -- "$word") )
            return
        fi
        ;;
    esac
    COMPREPLY=( $(compgen -W "$(_llava_steps_flags "$module")" -- "$word") )
}
"""

BASH = r"""
# Whether the line is ours: -m llava_steps..., also while that is being written.
_llava_steps_ours() {
    local at
    for ((at = 1; at < COMP_CWORD; at++)); do
        [[ ${COMP_WORDS[at]} == -m ]] && [[ ${COMP_WORDS[at + 1]} == llava_steps* ]] && return
    done
    return 1
}

_llava_steps_python() {
    if _llava_steps_ours; then
        _llava_steps
    elif [[ -n ${_llava_steps_before-} ]]; then
        "$_llava_steps_before" "$@"
    fi
}

# What completed python before goes on with all other lines. bash-completion loads it when asked.
for _llava_steps_load in _comp_complete_load _completion_loader; do
    if declare -F "$_llava_steps_load" >/dev/null && ! complete -p python >/dev/null 2>&1; then
        "$_llava_steps_load" python >/dev/null 2>&1
    fi
done
unset _llava_steps_load
if [[ $(complete -p python 2>/dev/null) =~ \ -F\ ([^ ]+) ]] &&
    [[ ${BASH_REMATCH[1]} != _llava_steps_python ]]; then
    _llava_steps_before=${BASH_REMATCH[1]}
fi
complete -o bashdefault -o default -F _llava_steps_python @PYTHONS@
"""

ZSH = r"""
autoload -U +X bashcompinit && bashcompinit

# What completed python before goes on with all other lines; zsh's own is known by a pattern.
_llava_steps_python() {
    local at=${words[(i)-m]}
    if (( at < CURRENT )) && [[ ${words[at + 1]-} == llava_steps* ]]; then
        _bash_complete -o bashdefault -o default -F _llava_steps
    else
        ${_llava_steps_before:-_default}
    fi
}
() {
    setopt local_options extended_glob
    if [[ ${_comps[python]-} != _llava_steps_python ]]; then
        typeset -g _llava_steps_before=${_comps[python]:-${_postpatcomps[(k)python]-}}
    fi
}
compdef _llava_steps_python @PYTHONS@
"""

if __name__ == "__main__":
    sys.exit(main())
