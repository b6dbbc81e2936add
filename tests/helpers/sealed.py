"""Results in a store, sealed without running their steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.store import store


def seal(
    root: Path,
    place: str,
    step: str,
    files: dict[str, Any],
    metrics: dict[str, Any],
    inputs: dict[str, dict[str, str]] | None = None,
    earlier_s: float = 0.0,
    **config: Any,
) -> Path:
    """A result of `step` at `root/results/PLACE`; files are bytes, texts, or values for JSON."""
    entry = root / "store" / place.replace("/", "_") / "0"
    for name, data in files.items():
        path = entry / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(data, bytes | str):
            data = json.dumps(data)
        filesystem.write_bytes(path, data if isinstance(data, bytes) else data.encode())
    store.seal(
        entry,
        {
            "step": step,
            "fingerprint": filesystem.sha256_json(place)[:32],
            "config": {"seed": 1234, **config},
            "code": "0123456789abcdef",
            "image": "",
            "inputs": inputs or {},
            "metrics": metrics,
            "attempts": 1,
            "wall_s": 12.5,
            "earlier_s": earlier_s,
        },
    )
    shown = root / "results" / place
    store.publish(entry, shown)
    return shown


def losses(start: float, steps: int, validated: bool = False) -> str:
    """metrics.jsonl of a training whose loss falls from `start`."""
    rows = []
    for step in range(steps):
        row = {"step": step, "loss": start * math.exp(-3 * step / steps) + 0.1 * math.sin(step)}
        if validated and step % 10 == 9:
            row["val_loss"] = row["loss"] + 2.0
        rows.append(json.dumps(row) + "\n")
    return "".join(rows)


def scores(**shares: float) -> dict[str, Any]:
    """Scores of a model: `all`, and one kind for each other name."""
    return {
        name: {"accuracy": share, "questions": 800 if name == "all" else 200}
        for name, share in shares.items()
    }
