"""Can this state be released? Builds sdist and wheel, checks them, installs the wheel, asks it.

    python -m tests.benchmarks.release

Makes an environment of its own with `build` and `twine` from PyPI, builds from what is committed,
runs `twine check --strict`, installs the wheel with the versions of constraints.txt into a second,
clean environment and runs `--help` of every command there. The last line is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from llava_steps.pipeline.command_line import commands

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> None:
    """A command; AssertionError if it fails."""
    result = subprocess.run([str(word) for word in command], cwd=cwd)
    assert result.returncode == 0, f"{command}: exit code {result.returncode}"


def main() -> int:
    """Check; returns the exit code."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for name in ("tools", "clean"):
            venv.create(place / name, with_pip=True)
        tools, clean = place / "tools/bin/python", place / "clean/bin/python"
        run("git", "clone", "--quiet", ROOT, place / "source", cwd=place)
        run(tools, "-m", "pip", "install", "-q", "build", "twine", cwd=place)
        run(tools, "-m", "build", "--outdir", place / "dist", place / "source", cwd=place)
        made = sorted((place / "dist").iterdir())
        run(tools, "-m", "twine", "check", "--strict", *made, cwd=place)
        (wheel,) = (path for path in made if path.suffix == ".whl")
        constraints = place / "source/constraints.txt"
        run(clean, "-m", "pip", "install", "-q", "-c", constraints, wheel, cwd=place)
        run(clean, "-m", "pip", "check", cwd=place)
        for name in commands():
            run(clean.with_name("llava-steps"), name, "--help", cwd=place)
        result = {"built": [path.name for path in made], "passed": len(made) == 2}
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
