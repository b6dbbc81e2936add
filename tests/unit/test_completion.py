"""The completion script, asked by a real bash, against what `--help` prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_steps.commands import completion
from llava_steps.pipeline.steps import MODULES
from llava_steps.settings import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the command prints it, which must not take torch for it."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llava_steps.commands.completion", "bash"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(re.findall(r"\| +(\w+)$", result.stderr, flags=re.M))
    assert "pydantic" in loaded and not loaded & {"torch", "transformers", "snakemake"}
    path = tmp_path_factory.mktemp("completion") / "script"
    path.write_text(result.stdout)
    return path


def bash(text: str, *words: str) -> list[str]:
    """Lines that a bash without any start-up file prints."""
    result = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", text, "bash", *words],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split("\n")[:-1]


def offered(script: Path, *words: str, before: str = "") -> list[str]:
    """What TAB offers for the last word, with words as bash splits the line."""
    asked = (
        f'{before} . "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_llava_steps_python "$1"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return [line for line in bash(asked, str(script), *words) if line]


def in_help(command: str) -> list[tuple[set[str], set[str]]]:
    """(spellings, choices) of each flag that `--help` explains."""
    text = completion.parser_of(command).format_help()
    found = []
    for line in re.findall(r"^  (-\S.*?)(?:   ?\S.*)?$", text, flags=re.M):
        choices = re.findall(r"\{(.*?)\}", line)
        flags = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", re.sub(r"\{.*?\}", "", line)))
        found.append((flags, set(",".join(choices).split(",")) - {""}))
    return found


def test_every_command_is_offered(script: Path) -> None:
    commands = cli.commands()
    assert set(MODULES.values()) <= set(commands) and "llava_steps.commands.plan" in commands
    assert offered(script, "python", "-m", "llava_steps.") == commands
    assert offered(script, "python", "-m", "llava_steps.tr") == ["llava_steps.train"]
    assert offered(script, ".venv/bin/python", "-X", "dev", "-m", "llava_steps") == commands


@pytest.mark.parametrize("command", cli.commands())
def test_a_command_runs_and_has_the_flags_of_its_help(script: Path, command: str) -> None:
    assert "__main__" in (ROOT / f"{command.replace('.', '/')}.py").read_text()
    explained = in_help(command)
    flags = set().union(*(flags for flags, _ in explained))
    assert {"-h", "--help"} <= flags
    assert set(offered(script, "python", "-m", command, "-")) == flags
    for spellings, choices in explained:
        for flag in spellings if choices else ():
            assert set(offered(script, "python", "-m", command, flag, "")) == choices, flag


def test_values_of_flags(script: Path) -> None:
    train = ("python", "-m", "llava_steps.train")
    assert offered(script, *train, "--stage=1", "--lr-schedule", "co") == ["cosine", "constant"]
    # bash makes three words of a flag with its value.
    assert offered(script, *train, "--stage", "=") == ["1", "2"]
    assert offered(script, *train, "--lr-schedule", "=", "w") == ["wsd"]
    # Any text: bash offers file names itself.
    assert offered(script, *train, "--save-dir", "") == []
    assert offered(script, *train, "--save-dir", "=", "res") == []
    # A switch takes none: what comes next is a flag.
    assert "--lr" in offered(script, *train, "--freeze-lm", "")
    assert offered(script, *train, "--freeze-lm", "--no-fr") == [
        "--no-freeze-vision",
        "--no-freeze-projector",
        "--no-freeze-lm",
    ]
    assert offered(script, "python", "-m", "llava_steps.commands.completion", "") == ["bash", "zsh"]
    assert offered(script, "python", "-m", "llava_steps.commands.chat", "--page", "") == []


def test_other_lines_are_left_to_who_had_them(script: Path) -> None:
    before = "_other() { COMPREPLY=(theirs); }; complete -F _other python;"
    for words in (("python", "-m", "json.to"), ("python", "x.py", ""), ("python", "-m", "")):
        assert offered(script, *words) == []
        assert offered(script, *words, before=before) == ["theirs"]
        assert offered(script, *words, before=f'{before} . "$1";') == ["theirs"]
    ours = ("python", "-m", "llava_steps.pla")
    assert offered(script, *ours, before=before) == ["llava_steps.commands.plan"]


def test_names_of_python_are_registered(script: Path) -> None:
    lines = bash('. "$1"; complete -p', str(script))
    named = {line.split()[-1] for line in lines if "_llava_steps_python" in line}
    assert named == set(completion.PYTHONS)
    assert all("-o default" in line for line in lines if "_llava_steps_python" in line)
