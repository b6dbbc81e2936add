"""Random recipes with stub steps: what runs equals an independent model of what must.

    python -m tests.benchmarks.recipes --count 20

Each recipe is run, run again (nothing may run), and run after an edit of one dataset (only what it
feeds may run). The last line is JSON with the number of recipes and of those that held.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.helpers.random_recipe import generate
from tests.workflow.project import Project, make_project

COMMAND = ("--cores", "4", "all", "--configfile", "recipe.yaml")


def wrong(seed: int, root: Path) -> str:
    """What is wrong with a run of the recipe of this seed; empty when it holds."""
    recipe = generate(seed)
    project = make_project(root)
    recipe.write(root)
    before = _computed(project)
    if before != recipe.values():
        return f"computed {_apart(before, recipe.values())}\n{recipe.text()}"
    if again := _computed(project):
        return f"a second run computed {dict(again)}\n{recipe.text()}"
    name = random.Random(seed).choice([*recipe.datasets])
    old = recipe.all_values()
    recipe.contents[name] = "edited"
    recipe.write(root)
    after = _computed(project)
    expected = Counter(value[0] for value in recipe.all_values() - old)
    if after != expected:
        return f"after an edit of {name} computed {_apart(after, expected)}\n{recipe.text()}"
    return ""


def _computed(project: Project) -> Counter[str]:
    """Steps that a run computes, with their numbers."""
    project.forget_calls()
    project.snakemake(*COMMAND)
    return Counter(str(call["step"]) for call in project.calls())


def _apart(found: Counter[str], expected: Counter[str]) -> str:
    return f"too many {dict(found - expected)}, too few {dict(expected - found)}"


def main() -> int:
    """Print what is wrong and the JSON line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    held = 0
    for seed in range(given.seed, given.seed + given.count):
        with tempfile.TemporaryDirectory() as place:
            problem = wrong(seed, Path(place) / "project")
        held += not problem
        if problem:
            print(f"seed {seed}: {problem}", file=sys.stderr, flush=True)
    print(json.dumps({"recipes": given.count, "held": held}))
    return 0 if held == given.count else 1


if __name__ == "__main__":
    sys.exit(main())
