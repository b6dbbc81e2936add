"""The completion script, asked by a real bash, against what `--help` prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_steps.commands import completion
from llava_steps.pipeline import command_line
from llava_steps.settings.steps import modules

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the command prints it, which must not import torch for it."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llava_steps", "completion", "bash"],
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


def bash(text: str, *words: str, cwd: Path = ROOT) -> list[str]:
    """Lines that a bash without any start-up file prints."""
    result = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", text, "bash", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split("\n")[:-1]


def offered(script: Path, *words: str, cwd: Path = ROOT) -> list[str]:
    """What TAB offers for the last word of a `llava-steps` line, with words as bash splits it."""
    asked = (
        '. "$1"; shift; COMP_WORDS=(llava-steps "$@"); COMP_CWORD=$#; '
        '_llava_steps llava-steps; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return [line for line in bash(asked, str(script), *words, cwd=cwd) if line]


def in_help(command: str) -> list[tuple[set[str], set[str]]]:
    """(spellings, choices) of each flag that `--help` explains."""
    text = command_line.parser_of(command).format_help()
    found = []
    for line in re.findall(r"^  (-\S.*?)(?:   ?\S.*)?$", text, flags=re.M):
        choices = re.findall(r"\{(.*?)\}", line)
        flags = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", re.sub(r"\{.*?\}", "", line)))
        found.append((flags, set(",".join(choices).split(",")) - {""}))
    return found


def test_every_command_is_offered(script: Path) -> None:
    commands = command_line.commands()
    assert set(modules()) <= set(commands.values()) and "plan" in commands
    assert offered(script, "") == list(commands)
    assert offered(script, "tr") == ["train"]
    assert set(offered(script, "-")) == {"-h", "--help", "--version"}


@pytest.mark.parametrize("command", command_line.commands())
def test_a_command_has_the_flags_of_its_help(script: Path, command: str) -> None:
    explained = in_help(command)
    flags = set().union(*(flags for flags, _ in explained))
    assert {"-h", "--help"} <= flags
    assert set(offered(script, command, "-")) == flags
    for spellings, choices in explained:
        for flag in spellings if choices else ():
            assert set(offered(script, command, flag, "")) == choices, flag


def test_both_spellings_of_a_name_are_completed(script: Path) -> None:
    assert offered(script, "hf-") == ["hf-to-megatron"]
    assert offered(script, "megatron-to") == ["megatron-to-hf"]
    for name in command_line.commands():
        dashed = name.replace("_", "-")
        assert offered(script, dashed, "-") == offered(script, name, "-") != []
    assert offered(script, "hf-to-megatron", "--tp", "1", "--megatron") == ["--megatron-dir"]
    assert offered(script, "megatron-to-hf", "--export-format", "=", "transformers-4") == [
        "transformers-4"
    ]


def test_values_of_flags(script: Path) -> None:
    assert offered(script, "train", "--lr-schedule", "co") == ["cosine", "constant"]
    # bash makes three words of a flag with its value.
    assert offered(script, "train", "--stage", "=", "1", "--lr-schedule", "w") == ["wsd"]
    assert offered(script, "train", "--stage", "=") == ["1", "2"]
    assert offered(script, "train", "--lr-schedule", "=", "w") == ["wsd"]
    # Any text: bash offers file names itself.
    assert offered(script, "train", "--name", "") == []
    assert offered(script, "train", "--name", "=", "res") == []
    # A switch takes none: what comes next is a flag.
    assert "--lr" in offered(script, "train", "--freeze-lm", "--")
    assert offered(script, "train", "--freeze-lm", "--no-fr") == [
        "--no-freeze-vision",
        "--no-freeze-projector",
        "--no-freeze-lm",
    ]
    assert offered(script, "completion", "") == ["bash", "zsh", "tcsh"]


def test_paths_are_completed(script: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "rest.yaml").touch()
    assert offered(script, "train", "--save-dir", "res", cwd=tmp_path) == ["results"]
    assert offered(script, "train", "--tokenizer-load-dir", "=", "res", cwd=tmp_path) == ["results"]
    both = ["rest.yaml", "results"]
    for line in (("plan", "--configfile"), ("train", "--data-path"), ("verify",)):
        assert sorted(offered(script, *line, "res", cwd=tmp_path)) == both, line


def test_only_our_command_is_registered(script: Path) -> None:
    (line,) = [line for line in bash('. "$1"; complete -p', str(script)) if "llava" in line]
    assert line.split()[-1] == "llava-steps" and "-F _llava_steps " in line
    assert "-o default" in line


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_every_command(shell: str) -> None:
    text = completion.script(shell)
    for command in command_line.commands():
        assert command in text and command.replace("_", "-") in text
