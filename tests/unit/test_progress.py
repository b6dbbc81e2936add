"""Progress: a bar for one step on a terminal, lines for several and in a log."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from llava_steps.core.log import PROGRESS
from llava_steps.pipeline import workflow

ROOT = Path(__file__).parents[2]
STEP = """
import sys, time
from llava_steps.core.log import Progress, logger
with Progress(logger(sys.argv[1]), "counting", 300) as bar:
    for number in range(300):
        bar.advance(note=f"at {number}", due=True)
"""
LINE = re.compile(
    r"\d\d:\d\d:\d\d (one|two) INFO counting \d+/300, [\d.]+/s, \d+(?:\.\d)? s left at \d+"
)


def start(name: str, terminal: int, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", STEP, name],
        cwd=ROOT,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", **environment},
    )


def shown(*names: str, **environment: str) -> str:
    """What a terminal gets of steps that run at a time."""
    ours, theirs = pty.openpty()
    steps = [start(name, theirs, **environment) for name in names]
    os.close(theirs)
    parts = []
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux says so when the last writer is gone
            break
        if not data:
            break
        parts.append(data)
    os.close(ours)
    assert [step.wait() for step in steps] == [0] * len(names)
    return b"".join(parts).decode()


def test_steps_of_the_workflow_do_not_write_into_each_others_lines() -> None:
    text = shown("one", "two", LLAVA_STEPS_PROGRESS="lines")
    lines = text.replace("\r\n", "\n").splitlines()
    assert len(lines) == 600 and not [line for line in lines if not LINE.fullmatch(line)]


def test_one_step_by_hand_has_a_bar() -> None:
    text = shown("one", LLAVA_STEPS_PROGRESS="", COLUMNS="120")
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    assert re.search(r"━.* 300/300.* [\d.]+/s.* \d:\d\d:\d\d.* at 299", plain)
    assert len(LINE.findall(text)) == 1, "the sum stays when the bar is gone"


def test_the_workflow_asks_for_lines() -> None:
    text = (ROOT / "workflow/rules/common.smk").read_text(encoding="utf-8")
    assert "\nset_environment()\n" in text
    kept = dict(os.environ)
    try:
        os.environ.pop(PROGRESS, None)
        workflow.set_environment()
        assert os.environ[PROGRESS] == "lines"
        assert os.environ[f"APPTAINERENV_{PROGRESS}"] == "lines"
    finally:
        os.environ.clear()
        os.environ.update(kept)
    assert PROGRESS == "LLAVA_STEPS_PROGRESS"
