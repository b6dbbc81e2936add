"""The results of a sweep, made without running any step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.sealed import losses, scores, seal


class Made(NamedTuple):
    """A variant of the fixture."""

    accuracy: float
    last_loss: float
    settings: dict[str, Any]


def make_sweep(root: Path, variants: dict[str, Made]) -> list[str]:
    """Flags of `compare` for variants that share stage 1 and each have an own stage 2."""
    shared = seal(
        root, "stage1_checkpoint", "stage1_checkpoint",
        {"metrics.jsonl": losses(4.0, 40)}, {"last_loss": 0.9},
    )  # fmt: skip
    flags = []
    for number, (label, made) in enumerate(variants.items()):
        own = seal(
            root, f"{number}/stage2_checkpoint", "stage2_checkpoint",
            {"metrics.jsonl": losses(3.0 + number, 60, validated=True)},
            {"last_loss": made.last_loss},
        )  # fmt: skip
        results = {
            "before": scores(all=0.1, what=0.1),
            "after_stage1": scores(all=0.99, what=0.99),
            "after_stage2": scores(all=made.accuracy, what=0.5, which=made.accuracy / 2),
        }
        held_out = seal(
            root, f"{number}/evaluation", "evaluation", {"results.json": results}, {"questions": 8}
        )
        flags += [
            f"--settings={label}={json.dumps(made.settings)}",
            f"--last-stages={label}=stage2",
            f"--evaluations={label}={held_out}",
            f"--trainings={label}/stage1={shared}",
            f"--trainings={label}/stage2={own}",
        ]
    return flags
