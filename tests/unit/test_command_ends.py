"""What ends a command and is no mistake in its code ends it without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import llava_steps

ROOT = Path(__file__).parents[2]
SCRIPT = """\
import sys
from llava_steps.__main__ import run
if __name__ == '__main__':
    sys.exit(run())
"""
"""What pip installs as bin/llava-steps."""
STARTS = (["-m", "llava_steps"], ["bin/llava-steps"])
"""Both ways to call the command."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with bin/llava-steps."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/llava-steps").write_text(SCRIPT)
    return tmp_path


def ended(
    line: Sequence[str], cwd: Path, stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """How a Python ends that finds this checkout."""
    return subprocess.run(
        [sys.executable, *line],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "line", [[*STARTS[0], "plan"], ["-m", "llava_steps.train"], [*STARTS[1], "doctor"]], ids=str
)
def test_a_command_names_the_environment(line: list[str], place: Path) -> None:
    done = ended(["-S", *line], place)  # without site-packages
    assert done.returncode == 1
    (told,) = done.stderr.splitlines()
    assert told.startswith("No module named '") and f"for {sys.executable}; activate the" in told


@pytest.mark.parametrize("start", [["-u", *STARTS[0]], *STARTS], ids=str)
@pytest.mark.parametrize("words", [["completion", "bash"], ["--help"], []], ids=str)
def test_a_reader_that_goes_away_is_no_news(
    start: list[str], words: list[str], place: Path
) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = ended([*start, *words], place, stdout=writes)
    os.close(writes)
    # argparse drops what a closed output says while it prints the help.
    assert done.returncode in ((0, 1) if words == ["--help"] else (1,)) and done.stderr == ""


def test_ctrl_c_is_no_news(tmp_path: Path) -> None:
    # A shell starts what is in its background without an ear for it.
    lines = (
        "import os, signal, sys; sys.argv[0] = '-m'",
        "import llava_steps",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        "os.kill(os.getpid(), signal.SIGINT)",
    )
    done = ended(["-c", "\n".join(lines)], tmp_path)
    assert done.returncode == -signal.SIGINT and done.stderr == ""


def test_ctrl_c_in_a_tool(tmp_path: Path) -> None:
    lines = (
        "import os, signal, sys; sys.argv = ['-m', 'plan']",
        "from llava_steps import __main__",
        "from llava_steps.commands import plan",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        "plan.main = lambda arguments: os.kill(os.getpid(), signal.SIGINT)",
        "__main__.run()",
    )
    done = ended(["-c", "\n".join(lines)], tmp_path)
    assert done.returncode == 130 and done.stderr == ""


def test_what_a_mistake_in_the_code_ends_with_stays(tmp_path: Path) -> None:
    lines = (
        "import sys; sys.argv[0] = '-m'",
        "import llava_steps",
        "assert sys.excepthook is not sys.__excepthook__",
        "import llava_steps.nothing",
    )
    done = ended(["-c", "\n".join(lines)], tmp_path)
    assert "Traceback" in done.stderr and "llava_steps.nothing" in done.stderr


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_names_and_what_is_not_one(start: list[str], place: Path) -> None:
    for name in ("hf_to_megatron", "hf-to-megatron"):
        done = ended([*start, name, "--help"], place)
        assert done.returncode == 0 and done.stdout.startswith("usage: llava-steps hf_to_megatron")
    for name, rest in {
        "trian": "did you mean train?",
        "qqqq": "`llava-steps --help` lists them",
    }.items():
        done = ended([*start, name, "--stage", "1"], place)
        told = f"llava-steps: '{name}' is not a step or a tool; {rest}\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", told)
    done = ended([*start, "--version"], place)
    assert (done.returncode, done.stdout) == (0, f"llava-steps {llava_steps.__version__}\n")


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_an_error_of_a_step_or_a_tool_is_one_line(start: list[str], place: Path) -> None:
    done = ended([*start, "plan"], place)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    done = ended([*start, "hf-to-megatron", "--hf-dir=gone", "--save-dir=out"], place)
    assert done.returncode == 3
    (told,) = done.stderr.splitlines()
    assert "hf_to_megatron ERROR --hf-dir: gone does not exist" in told
