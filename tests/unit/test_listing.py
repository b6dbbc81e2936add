"""`llava-steps` lists every step and tool, steps first and in their order."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_steps.settings.steps import modules

PACKAGE = Path(__file__).parents[2] / "llava_steps"


@pytest.mark.parametrize("flags", [(), ("--help",)])
def test_every_command_with_its_first_sentence(flags: tuple[str, ...]) -> None:
    line = [sys.executable, "-m", "llava_steps", *flags]
    told = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    named = dict(re.findall(r"^  (\w+) +(\S.*)$", told, flags=re.M))
    there = {path.stem: path for path in PACKAGE.glob("[!_]*.py")}
    there |= {path.stem: path for path in PACKAGE.glob("commands/[!_]*.py")}
    assert set(named) == set(there)
    steps = [module.rpartition(".")[2] for module in modules()]
    assert list(named)[: len(steps)] == steps
    for name, sentence in named.items():
        assert there[name].read_text().startswith(f'"""{sentence}\n'), name


def test_the_list_loads_nothing_heavy() -> None:
    line = [sys.executable, "-X", "importtime", "-m", "llava_steps", "--help"]
    text = subprocess.run(line, capture_output=True, text=True, check=True).stderr
    loaded = {row.rpartition("|")[2].strip() for row in text.splitlines()}
    assert "llava_steps.pipeline.command_line" in loaded
    assert not loaded & {"torch", "megatron", "transformers", "snakemake", "llava_steps.train"}
