"""The way of someone who comes for the first time: a clone, the README's commands, an answer.

    python -m tests.benchmarks.newcomer

Clones the committed state into a directory of its own, runs `make demo` as the README says, runs it
again (nothing may be left to do), then the line that it prints for asking the model, and the line
of the README that does. The last line is JSON. It takes what the demo takes, and room for one
environment; network as pip needs it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(command: list[str], cwd: Path) -> str:
    """Standard output of a command; its errors go to the terminal. AssertionError if it fails."""
    result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}: exit code {result.returncode}"
    return result.stdout


def first_command() -> list[str]:
    """The command of the README's first block that is one."""
    return shlex.split(re.findall(r"^```\n(make .*)\n```$", README, flags=re.M)[0])


def question(printed: str) -> list[str]:
    """The line after `Ask it:`."""
    return shlex.split(re.findall(r"^Ask it: +(.*)$", printed, flags=re.M)[0])


def chat(clone: Path) -> list[str]:
    """The README's line that asks, in the environment that `make demo` made."""
    line = re.findall(r"^llava-steps (chat results/.*)$", README, flags=re.M)[0]
    return [str(clone / ".venv/bin/llava-steps"), *shlex.split(line)]


def main() -> int:
    """Walk; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--directory", type=Path, help="where the clone goes; default: temporary")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=given.directory) as place:
        clone = Path(place, "llava-steps")
        run(["git", "clone", "--quiet", str(ROOT), str(clone)], Path(place))
        printed = run(first_command(), clone)
        demo_s = time.monotonic() - began
        again = time.monotonic()
        printed_again = run(first_command(), clone)
        again_s = time.monotonic() - again
        accuracy = json.loads(printed.splitlines()[-1])["accuracy_stage2"]
        same = json.loads(printed_again.splitlines()[-1])["accuracy_stage2"] == accuracy
        answer = run(question(printed), clone).strip()
        as_written = run(chat(clone), clone).strip()
    result = {
        "demo_s": round(demo_s, 1),
        "again_s": round(again_s, 1),
        "accuracy_stage2": accuracy,
        "answer": answer,
        "readme_answer": as_written,
        "passed": bool(answer) and bool(as_written) and same and accuracy > 0.5,
    }
    print(json.dumps(result, ensure_ascii=False))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
