"""python -m tests.benchmarks.layouts [--pairs N]: every parallel layout trains the same model.

Each layout trains 20 steps from the same weights, in fp32, with a constant learning rate; its
losses are compared with those of one process. Then each one's checkpoint of step 10, optimizer
included, is loaded by each other layout (`load_optim`), which trains on to step 20: again the same
losses, from the first step on. The last line is JSON: {"layouts", "passed", "pairs",
"pairs_passed", "max_deviation"}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests import chain

STEPS, HALF, BAR = 20, 10, 1e-5
COMMON = (
    "--stage=2", "--lr=1e-3", "--lr-schedule=constant", "--warmup-steps=3", "--weight-decay=0.1",
    "--global-batch-size=8", "--micro-batch-size=2",
)  # fmt: skip
LAYOUTS = {
    "one process": ("--gpus=1",),
    "dp2": ("--gpus=2",),
    "dp4": ("--gpus=4",),
    "tp2": ("--gpus=2", "--tp=2"),
    "tp2 sp": ("--gpus=2", "--tp=2", "--sequence-parallel"),
    "pp2": ("--gpus=2", "--pp=2"),
    "tp2 dp2": ("--gpus=4", "--tp=2"),
    "tp2 sp dp2": ("--gpus=4", "--tp=2", "--sequence-parallel"),
    "pp2 dp2": ("--gpus=4", "--pp=2"),
    "tp2 pp2": ("--gpus=4", "--tp=2", "--pp=2"),
    "tp2 sp pp2": ("--gpus=4", "--tp=2", "--pp=2", "--sequence-parallel"),
    "recompute core_attn": ("--gpus=1", "--recompute=core_attn"),
    "recompute full": ("--gpus=1", "--recompute=full"),
    "tp2 sp pp2 recompute full": (
        "--gpus=4", "--tp=2", "--pp=2", "--sequence-parallel", "--recompute=full",
    ),
}  # fmt: skip
REFERENCE = "one process"


def losses(made: chain.Chain, name: str, *flags: str) -> list[float]:
    """Losses of a training into results/NAME."""
    return [row["loss"] for row in chain.metrics(made.train(name, *COMMON, *flags))]


def deviation(found: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def compare(made: chain.Chain, names: list[str], pairs: int, seed: int) -> dict[str, float]:
    """Train in all layouts, then from each other's checkpoints; prints a row each."""
    slug = {name: name.replace(" ", "_") for name in LAYOUTS}
    whole = losses(made, "whole", f"--train-steps={STEPS}", *LAYOUTS[REFERENCE])
    assert len(set(whole)) == STEPS
    worst, passed = 0.0, 0
    for name in names:
        flags = LAYOUTS[name]
        found = losses(made, f"all_{slug[name]}", f"--train-steps={STEPS}", *flags)
        losses(made, f"half_{slug[name]}", f"--train-steps={HALF}", *flags)
        apart = deviation(found, whole)
        worst, passed = max(worst, apart), passed + (apart <= BAR)
        print(f"{name:28s} {apart:.1e} {'ok' if apart <= BAR else 'WRONG'}", flush=True)
    every = list(itertools.permutations(names, 2))
    chosen = every if not pairs else random.Random(seed).sample(every, min(pairs, len(every)))
    good = 0
    for number, (source, target) in enumerate(chosen):
        start = (made.root / f"results/half_{slug[source]}").resolve()
        line = (f"--train-steps={STEPS}", "--load-optim", f"--megatron-load-dir={start}")
        found = losses(made, f"pair_{number}", *line, *LAYOUTS[target])
        apart = deviation(found, whole[HALF:])
        worst, good = max(worst, apart), good + (apart <= BAR)
        verdict = "ok" if apart <= BAR else "WRONG"
        print(f"{source:28s} -> {target:28s} {apart:.1e} {verdict}", flush=True)
        entry = (made.root / f"results/pair_{number}/samples").resolve().parent
        shutil.rmtree(entry)
    return {
        "layouts": len(names),
        "passed": passed,
        "pairs": len(chosen),
        "pairs_passed": good,
        "max_deviation": worst,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=0, help="only so many pairs, at random")
    given = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="layouts-"))
    try:
        found = compare(chain.make(room), list(LAYOUTS), given.pairs, 1)
    finally:
        shutil.rmtree(room)
    print(json.dumps(found))
    return (found["passed"], found["pairs_passed"]) != (found["layouts"], found["pairs"])


if __name__ == "__main__":
    sys.exit(main())
