"""How long `--help` of every command and a dry run of the demo take, against doing nothing.

    python -m tests.benchmarks.cli --rounds 5

Each command runs `--rounds` times in turn with its yardstick, `python -c pass` or a dry run of a
Snakefile without rules, once before to warm up. What counts is CPU time, the least of each, so that
other work on the machine matters little; these commands neither wait nor use a second core, so a
quiet machine shows the same on the clock. The last line is JSON; the exit code is 1 when a bar is
missed: `--help` may take 15 times its yardstick, which is 0.3 s where `python -c pass` takes 20 ms;
the dry run three times its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from llava_steps.pipeline.command_line import commands

ROOT = Path(__file__).parents[2]
HELP_RATIO, DRY_RUN_RATIO = 15.0, 3.0


def seconds(command: list[str], cwd: Path) -> float:
    """CPU time of a command that succeeds, of the user and the system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=cwd, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def fastest(commands: dict[str, tuple[list[str], Path]], rounds: int) -> dict[str, float]:
    """The least of `rounds` runs of each command, one after the other in each round."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, (command, cwd) in commands.items():
            spent = seconds(command, cwd)
            if number:
                times[name].append(spent)
    return {name: min(found) for name, found in times.items()}


def main() -> int:
    """Print the table and the JSON line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    helps = {
        f"llava-steps {name}".rstrip(): (["-m", "llava_steps", *name.split(), "--help"], ROOT)
        for name in ("", *commands())
    }
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty) / "Snakefile").write_text("rule all:\n    input: []\n")
        dry = ["-m", "snakemake", "-n", "--cores", "1"]
        found = fastest(
            {
                "python -c pass": (["-c", "pass"], ROOT),
                **helps,
                "snakemake -n, no rules": (dry, Path(empty)),
                "snakemake -n, demo": (dry, ROOT),
            },
            rounds,
        )
    nothing = found["python -c pass"]
    for name, time_ in found.items():
        print(f"{name:<32} {time_:7.3f} s  {time_ / nothing:6.1f} x python -c pass")
    slowest = max(found[name] for name in helps)
    ratio = found["snakemake -n, demo"] / found["snakemake -n, no rules"]
    passed = slowest / nothing <= HELP_RATIO and ratio <= DRY_RUN_RATIO
    result = {
        "llava_steps_help_s": round(found["llava-steps"], 3),
        "slowest_help_s": round(slowest, 3),
        "slowest_help_ratio": round(slowest / nothing, 1),
        "dry_run_s": round(found["snakemake -n, demo"], 3),
        "dry_run_ratio": round(ratio, 2),
        "passed": passed,
    }
    print(json.dumps(result))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
