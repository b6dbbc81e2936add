"""What ends a command and is no mistake in its code ends it without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["plan", "train", "doctor"])
def test_a_command_names_the_environment(command: str, tmp_path: Path) -> None:
    bare = [sys.executable, "-S", "-m", f"llava_steps.{command}"]  # without site-packages
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(bare, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("No module named '") and f"for {sys.executable}; use the" in line


def test_a_reader_that_goes_away_is_no_news(tmp_path: Path) -> None:
    line = [sys.executable, "-u", "-m", "llava_steps", "completion", "bash"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        line, cwd=tmp_path, env=env, stdout=writes, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writes)
    assert done.returncode == 1 and done.stderr == ""


def ended(*lines: str) -> subprocess.CompletedProcess[str]:
    """How a command ends that does `lines` once the package is imported."""
    script = "\n".join(("import os, signal, sys; sys.argv[0] = '-m'", "import llava_steps", *lines))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    bare = [sys.executable, "-c", script]
    return subprocess.run(bare, env=env, capture_output=True, text=True, check=False)


def test_ctrl_c_is_no_news() -> None:
    # A shell starts what is in its background without an ear for it.
    done = ended(
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        "os.kill(os.getpid(), signal.SIGINT)",
    )
    assert done.returncode == -signal.SIGINT and done.stderr == ""


def test_what_a_mistake_in_the_code_ends_with_stays() -> None:
    done = ended("assert sys.excepthook is not sys.__excepthook__", "import llava_steps.nothing")
    assert "Traceback" in done.stderr and "llava_steps.nothing" in done.stderr
