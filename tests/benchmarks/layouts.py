"""python -m tests.benchmarks.layouts [--pairs N]: every parallel layout trains the same model.

Each layout trains 20 steps from the same weights, in fp32, vision tower included, with a constant
learning rate; its losses are compared with those of one process. Then each one's checkpoint of step
10, optimizer included, is loaded by each other layout (`load_optim`), which trains on to step 20:
again the same losses, from the first step on. LoRA's are compared with each other in the same way,
as its losses are others. The last line is JSON: {"layouts", "passed", "pairs", "pairs_passed",
"max_deviation"}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers import chain
from tests.helpers.dist_helpers import spawn
from tests.helpers.layout_workers import Room, Training, deep_model

STEPS, BAR = 20, 1e-5
COMMON: dict[str, Any] = {
    "stage": 2, "precision": "fp32", "num_workers": 0, "seq_length": 256, "lr": 1e-3,
    "lr_schedule": "constant", "weight_decay": 0.1, "global_batch_size": 8,
    "freeze_vision": False, "vision_lr": 3e-4, "projector_lr": 2e-3,
}  # fmt: skip


class Layout(NamedTuple):
    """Processes and the settings that differ from COMMON."""

    ranks: int
    settings: dict[str, Any]

    @property
    def lora(self) -> bool:
        return "lora_rank" in self.settings


PP2 = {"pipeline_model_parallel": 2}
PP4 = {"pipeline_model_parallel": 4}
TP2 = {"tensor_model_parallel": 2}
SP = {**TP2, "sequence_parallel": True}
VP = {**PP2, "virtual_pipeline": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 20_000}
COMPILED = {"compile": "layers", "overlap_grad_reduce": True, "bucket_size": 20_000}
FULL = {"recompute": "full"}
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "freeze_vision": True, "vision_lr": None, "lm_lr": 3e-3}
LAYOUTS = {
    "one process": Layout(1, {}),
    "dp2": Layout(2, {}),
    "dp4": Layout(4, {}),
    "dp4 overlap": Layout(4, OVERLAP),
    "tp2": Layout(2, TP2),
    "tp2 sp": Layout(2, SP),
    "pp2": Layout(2, PP2),
    "pp4": Layout(4, PP4),
    "tp2 dp2": Layout(4, TP2),
    "tp2 sp dp2 overlap": Layout(4, {**SP, **OVERLAP}),
    "pp2 dp2 overlap": Layout(4, {**PP2, **OVERLAP}),
    "pp2 dp2 uneven": Layout(4, {**PP2, "pipeline_split": "1,3"}),
    "pp2 dp2 interleaved": Layout(4, VP),
    "pp2 dp2 interleaved overlap": Layout(4, {**VP, **OVERLAP}),
    "tp2 pp2": Layout(4, {**TP2, **PP2}),
    "tp2 sp pp2 uneven": Layout(4, {**SP, **PP2, "pipeline_split": "3,1"}),
    "tp2 sp pp2 interleaved": Layout(4, {**SP, **VP, **FULL}),
    "dp2 compiled": Layout(2, {"compile": "layers"}),
    "dp4 compiled overlap": Layout(4, COMPILED),
    "pp2 dp2 interleaved compiled overlap": Layout(4, {**VP, **COMPILED}),
    "recompute core_attn": Layout(1, {"recompute": "core_attn"}),
    "recompute full": Layout(1, FULL),
    "lora": Layout(1, LORA),
    "lora dp4 overlap": Layout(4, {**LORA, **OVERLAP}),
    "lora tp2 pp2": Layout(4, {**LORA, **TP2, **PP2}),
    "lora tp2 sp pp2 interleaved": Layout(4, {**LORA, **SP, **VP, **FULL}),
}
REFERENCES = {False: "one process", True: "lora"}
Row = tuple[str, float]


def deviation(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference."""
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """(writer, reader) of all that can go on from each other."""
    every = itertools.permutations(names, 2)
    return [(a, b) for a, b in every if LAYOUTS[a].lora == LAYOUTS[b].lora]


def train(room: Room, trainings: Sequence[tuple[str, Training]]) -> dict[str, list[float]]:
    """Losses of trainings, given as (layout, training), by their names."""
    found: dict[str, list[float]] = {}
    for ranks in sorted({LAYOUTS[layout].ranks for layout, _ in trainings}):
        own = [training for layout, training in trainings if LAYOUTS[layout].ranks == ranks]
        work = "tests.helpers.layout_workers:train"
        losses = spawn(work, ranks, room.root, room, own, timeout=7200)[0]
        found |= {training.name: row for training, row in zip(own, losses, strict=True)}
    return found


def compare(
    room: Room, start: Path, names: Sequence[str], pairs: Sequence[tuple[str, str]], steps: int
) -> tuple[list[Row], list[Row]]:
    """Deviations of the layouts, and of the pairs after half of the steps, from their reference.

    The reference is the first of `names` with LoRA, and without.
    """
    half = steps // 2
    trainings = []
    for name in names:
        settings = {**COMMON, **LAYOUTS[name].settings}
        for kind, count in (("whole", steps), ("half", half)):
            made = Training(f"{kind} {name}", {**settings, "train_steps": count}, start)
            trainings.append((name, made))
    whole = train(room, trainings)
    going_on = []
    for source, target in pairs:
        settings = {**COMMON, **LAYOUTS[target].settings, "train_steps": steps, "load_optim": True}
        made = Training(f"{source} -> {target}", settings, room.entry(f"half {source}"))
        going_on.append((target, made))
    rest = train(room, going_on)

    def expected(name: str) -> list[float]:
        first = next(n for n in names if LAYOUTS[n].lora == LAYOUTS[name].lora)
        losses = whole[f"whole {first}"]
        assert len(set(losses)) == steps
        return losses

    rows = [(name, deviation(whole[f"whole {name}"], expected(name))) for name in names]
    pair_rows = [
        (training.name, deviation(rest[training.name], expected(target)[half:]))
        for target, training in going_on
    ]
    return rows, pair_rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=0, help="only so many pairs, at random")
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="layouts-"))
    names = list(LAYOUTS)
    pairs = pairs_of(names)
    if given.pairs:
        pairs = random.Random(1).sample(pairs, min(given.pairs, len(pairs)))
    try:
        made = chain.make(root)
        hf, start = deep_model(made, root)
        rows, pair_rows = compare(
            Room(hf, made.dataset.resolve(), root / "entries"), start, names, pairs, STEPS
        )
    finally:
        shutil.rmtree(root)
    for name, apart in (*rows, *pair_rows):
        print(f"{name:60s} {apart:.1e} {'ok' if apart <= BAR else 'WRONG'}")
    found = {
        "layouts": len(rows),
        "passed": sum(apart <= BAR for _, apart in rows),
        "pairs": len(pair_rows),
        "pairs_passed": sum(apart <= BAR for _, apart in pair_rows),
        "max_deviation": max(apart for _, apart in (*rows, *pair_rows)),
    }
    print(json.dumps(found))
    return (found["passed"], found["pairs_passed"]) != (found["layouts"], found["pairs"])


if __name__ == "__main__":
    sys.exit(main())
