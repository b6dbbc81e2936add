"""The stages of a run on its page: settings and curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_steps.reporting import charts, datasets
from llava_steps.reporting.content import Run, Stage, manifest
from llava_steps.reporting.files import read_rows, series
from llava_steps.reporting.kinds import heading
from llava_steps.settings.config import UNTRAINED
from llava_steps.settings.recipe import stage_title

SETTINGS = (
    "train_steps", "global_batch_size", "lr", "lr_schedule", "warmup_steps", "weight_decay",
    "precision", "tensor_model_parallel", "pipeline_model_parallel", "seq_length", "packing",
)  # fmt: skip
"""Settings of a stage that are shown beside its curves; provenance shows all of them."""
CURVES = (
    ("loss", "Loss", True),
    ("val_loss", "Validation loss", False),
    ("val_accuracy", "Validation accuracy by token", True),
    ("lr", "Learning rate", True),
    ("grad_norm", "Gradient norm", True),
    ("tokens_per_s", "Tokens per second", True),
)


def training(run: Run, stage: Stage) -> dict[str, Any]:
    """A stage with its settings and curves."""
    facts = manifest(stage.part)
    words = heading(stage.name)
    rows = read_rows(stage.part.item.path / "metrics.jsonl")
    curves = []
    for key, title, from_zero in CURVES:
        xs, ys = series(rows, key)
        if xs:
            svg = charts.curve(f"{words}, {title}", xs, ys, stage.tone, from_zero)
            curves.append({"title": title, "svg": svg})
    config = facts.get("config", {})
    metrics = stage.metrics
    return {
        "name": words,
        "data": datasets.of_stage(run, stage.part),
        "start": "" if run.is_chain else _start(stage),
        "metrics": metrics,
        "trained": [
            part
            for key, part in (
                ("freeze_vision", "vision tower"),
                ("freeze_projector", "projector"),
                ("freeze_lm", "language model"),
            )
            if config.get(key) is False
        ],
        "settings": [(key, config[key]) for key in SETTINGS if key in config],
        "processes": processes(config),
        "curves": curves,
        "left_out": metrics.get("steps", 0) - metrics.get("updates", metrics.get("steps", 0)),
        "attempts": facts.get("attempts", 1),
    }


def _start(stage: Stage) -> str:
    return start_words(stage.start)


def start_words(start: str | None) -> str:
    """What a stage starts from, in the middle of a sentence."""
    if start is None or "/" in start:
        return start or ""
    return "the untrained model" if start == UNTRAINED else stage_title(start)


def processes(config: Mapping[str, Any]) -> int:
    """Processes of a step; those without such settings have one."""
    return int(config.get("gpus", 1)) * int(config.get("nodes", 1))
