"""The variants of a sweep beside each other: figures, and the content of their page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_steps.core.errors import InputError
from llava_steps.reporting import overlay
from llava_steps.reporting.files import read_json, read_rows, series
from llava_steps.reporting.kinds import heading
from llava_steps.reporting.scores import IN_PERCENT, METRICS, marks
from llava_steps.settings import sweep
from llava_steps.settings.recipe import stage_title
from llava_steps.store.store import Input

METRIC = "accuracy"
"""What the best variant has most of, over all questions."""
LOSSES = (("loss", "Loss", True), ("val_loss", "Validation loss", False))


@dataclass(frozen=True)
class Variant:
    """A variant of a sweep and its results."""

    label: str
    settings: Mapping[str, Any]
    evaluation: Input
    trainings: Mapping[str, Input]
    """By stage, in order."""
    last_stage: str
    """The stage after which it is compared."""


def figures(variants: Sequence[Variant]) -> dict[str, Any]:
    """The content of comparison.json.

    Raises:
        InputError: an evaluation has no scores of the model after the last stage.
    """
    rows = [
        {
            "label": each.label,
            "settings": dict(each.settings),
            "last_stage": each.last_stage,
            "scores": _scores(each),
            "last_loss": _last_loss(each),
        }
        for each in variants
    ]
    ranks = [_rank(row) for row in rows]
    best = ranks.index(min(ranks))
    for number, row in enumerate(rows):
        row["best"] = number == best
    equal = [r["label"] for r, rank in zip(rows, ranks, strict=True) if rank == ranks[best]]
    return {
        "metric": METRIC,
        "best": rows[best]["label"],
        "as_good": [label for label in equal if label != rows[best]["label"]],
        "variants": rows,
    }


def page(made: Mapping[str, Any], variants: Sequence[Variant], title: str) -> dict[str, Any]:
    """What the template needs, from the figures."""
    rows = made["variants"]
    keys = sweep.varied([row["settings"] for row in rows]) or [*rows[0]["settings"]]
    overall = [row["scores"]["all"][METRIC] for row in rows]
    top = max(overall)
    losses = [row["last_loss"] for row in rows]
    stages = _stages(variants)
    return {
        "title": title,
        "best": made["best"],
        "as_good": made["as_good"],
        "best_score": top,
        "decided_by_loss": overall.count(top) > 1,
        "questions": max(row["scores"]["all"]["questions"] for row in rows),
        "after": [*dict.fromkeys(stage_title(row["last_stage"]) for row in rows)],
        "keys": [key.removeprefix("stages.") for key in keys],
        "rows": [
            {
                "label": row["label"],
                "tone": overlay.tone(number),
                "mark": standing(made, row["label"]),
                "settings": [
                    sweep.written(row["settings"][key]) if key in row["settings"] else None
                    for key in keys
                ],
                "loss": row["last_loss"],
                "loss_mark": marks("loss", losses)[number],
            }
            for number, row in enumerate(rows)
        ],
        "tables": [_table(metric, name, rows) for metric, name in _metrics(rows).items()],
        "same": [_curves(stage, variants) for stage in stages if not _differs(stage, variants)],
        "differing": [_curves(stage, variants) for stage in stages if _differs(stage, variants)],
    }


def standing(made: Mapping[str, Any], label: str) -> str:
    """`best`, `tied` of several that are as good, or nothing; all are nothing if equal."""
    top = {made["best"], *made["as_good"]}
    if label not in top or len(top) == len(made["variants"]):
        return ""
    return "tied" if made["as_good"] else "best"


def _scores(variant: Variant) -> Any:
    path = variant.evaluation.path / "results.json"
    results = read_json(path)
    model = f"after_{variant.last_stage}"
    if model not in results:
        raise InputError(
            f"{path} has no {model}, only {', '.join(results)}; give the evaluation of the variant "
            f"{variant.label} after {stage_title(variant.last_stage)}"
        )
    return results[model]


def _last_loss(variant: Variant) -> float | None:
    training = variant.trainings.get(variant.last_stage)
    loss = (training.manifest or {}).get("metrics", {}).get("last_loss") if training else None
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def _rank(row: Mapping[str, Any]) -> tuple[float, float]:
    """Smallest for the best: the highest accuracy, then the lowest last loss."""
    loss = row["last_loss"]
    return -row["scores"]["all"][METRIC], math.inf if loss is None else loss


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Metrics that every variant has."""
    return {
        metric: name
        for metric, name in METRICS.items()
        if all(metric in row["scores"]["all"] for row in rows)
    }


def _table(metric: str, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of each variant: of all questions, then of each kind that any variant was asked."""
    groups = [*dict.fromkeys(["all", *(g for row in rows for g in row["scores"])])]
    cells: list[list[dict[str, Any]]] = [[] for _ in rows]
    for group in groups:
        values = [row["scores"].get(group, {}).get(metric) for row in rows]
        for own, value, mark in zip(cells, values, marks(metric, values), strict=True):
            own.append({"value": value, "mark": mark})
    return {
        "metric": metric,
        "name": name,
        "in_percent": metric in IN_PERCENT,
        "groups": groups,
        "cells": cells,
    }


def _stages(variants: Sequence[Variant]) -> list[str]:
    return [*dict.fromkeys(stage for each in variants for stage in each.trainings)]


def _trainings(stage: str, variants: Sequence[Variant]) -> dict[str, list[int]]:
    """Positions of the variants by the digest of their training of a stage."""
    made: dict[str, list[int]] = {}
    for number, each in enumerate(variants):
        if stage in each.trainings:
            made.setdefault(each.trainings[stage].digest, []).append(number)
    return made


def _differs(stage: str, variants: Sequence[Variant]) -> bool:
    users = [*_trainings(stage, variants).values()]
    return len(users) > 1 or len(users[0]) < len(variants)


def _curves(stage: str, variants: Sequence[Variant]) -> dict[str, Any]:
    """The losses of a stage; variants that share its training are one line."""
    is_one = not _differs(stage, variants)
    metrics = {
        digest: read_rows(variants[users[0]].trainings[stage].path / "metrics.jsonl")
        for digest, users in _trainings(stage, variants).items()
    }
    charts = []
    title = heading(stage)
    for key, words, from_zero in LOSSES:
        lines = [
            overlay.Line(
                "all variants" if is_one else ", ".join(variants[n].label for n in users),
                *series(metrics[digest], key),
                overlay.tone(users[0]),
            )
            for digest, users in _trainings(stage, variants).items()
        ]
        if svg := overlay.chart(f"{title}, {words}", lines, from_zero):
            charts.append({"title": words, "svg": svg, "legend": overlay.legend(lines)})
    return {"title": title, "charts": charts}
