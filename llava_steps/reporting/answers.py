"""The evaluation of a run on its page: scores of every model, and sample answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_steps.core.errors import InputError
from llava_steps.reporting import overlay
from llava_steps.reporting.content import Model, Run
from llava_steps.reporting.files import picture, read_json
from llava_steps.reporting.kinds import Part, heading
from llava_steps.reporting.scores import IN_PERCENT, METRICS, marks
from llava_steps.settings.recipe import stage_title

SAMPLES = 36
"""Largest number of sample answers on the page."""


def evaluation(run: Run, samples: int) -> dict[str, Any] | None:
    """Scores and answers of the evaluated models; None where nothing was evaluated."""
    part = run.one("evaluation")
    if part is None:
        return None
    entry = part.item.path
    results = read_json(entry / "results.json")
    models = run.models(results)
    if not models:
        raise InputError(f"{entry / 'results.json'} has no model; run its step again")
    first = results[models[0].name]
    groups = [*(group for group in first if group != "all"), "all"]
    prompts = entry / "generations.json"
    return {
        "models": models,
        "tables": [
            _table(metric, words, results, models, groups)
            for metric, words in METRICS.items()
            if metric in first["all"]
        ],
        "overall": [results[model.name]["all"]["accuracy"] for model in models],
        "questions": first["all"]["questions"],
        "samples": _answers(entry, models, samples),
        "prompts": _prompts(entry, models) if prompts.is_file() else [],
    }


def _table(
    metric: str, words: str, results: Any, models: Sequence[Model], groups: Sequence[str]
) -> dict[str, Any]:
    best = max(results[m.name][g][metric] for m in models for g in groups) or 1.0
    whole = 1.0 if metric in IN_PERCENT else best
    rows = []
    for group in groups:
        values = [results[model.name][group][metric] for model in models]
        cells = [
            {"value": value, "share": value / whole, "best": bool(mark)}
            for value, mark in zip(values, marks(metric, values), strict=True)
        ]
        count = results[models[0].name][group]["questions"]
        rows.append({"group": group, "questions": count, "cells": cells})
    return {"metric": metric, "name": words, "rows": rows}


def _answers(entry: Path, models: Sequence[Model], count: int) -> list[dict[str, Any]]:
    """The first samples of each kind, with the answer of every model."""
    samples = read_json(entry / "samples.json")
    seen: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for number, first in enumerate(samples[models[0].name]):
        seen[first["group"]] = seen.get(first["group"], 0) + 1
        if seen[first["group"]] > count or len(rows) == SAMPLES:
            continue
        given = [
            {
                "model": model.title,
                "text": row["answer"],
                "right": row["right"],
                "cut": row.get("cut", False),
            }
            for model in models
            for row in [samples[model.name][number]]
        ]
        images = [picture(entry / name) for name in first.get("images", [])]
        rows.append(first | {"answers": given, "pictures": images})
    return rows


def _prompts(entry: Path, models: Sequence[Model]) -> list[dict[str, Any]]:
    return [
        {
            "question": row["prompt"],
            "answers": [{"model": m.title, "text": row["answers"][m.name]} for m in models],
            "pictures": [picture(entry / name) for name in row["images"]],
        }
        for row in read_json(entry / "generations.json")[:SAMPLES]
    ]


def by_step(run: Run) -> list[dict[str, Any]]:
    """Scores of the checkpoints that each stage kept, with those of its end."""
    kept: dict[str, list[Part]] = {}
    for part in run.kind("evaluation"):
        if part.step is not None:
            kept.setdefault(part.of, []).append(part)
    order = [stage.name for stage in run.stages]
    names = [*(name for name in order if name in kept), *(n for n in kept if n not in order)]
    return [_by_step(run, name, kept[name]) for name in names]


def _by_step(run: Run, name: str, kept: Sequence[Part]) -> dict[str, Any]:
    scores = {}
    for part in kept:
        path = part.item.path / "results.json"
        results = read_json(path)
        if f"step{part.step}" not in results:
            raise InputError(f"{path} has no step{part.step}, only {', '.join(results)}")
        scores[part.step or 0] = results[f"step{part.step}"]
    stage = next((stage for stage in run.stages if stage.name == name), None)
    end = stage.metrics["steps"] if stage else 0
    last = run.one("evaluation")
    final = read_json(last.item.path / "results.json").get(f"after_{name}") if last else None
    if end and final:
        scores[end] = final
    steps = sorted(scores)
    groups = [*dict.fromkeys(["all", *(group for step in steps for group in scores[step])])]
    lines = []
    for number, group in enumerate(groups):
        asked = [step for step in steps if group in scores[step]]
        shares = [scores[step][group]["accuracy"] for step in asked]
        tone = "tone-0 whole" if group == "all" else overlay.tone(number - 1)
        words = "all questions" if group == "all" else group
        lines.append(overlay.Line(words, asked, shares, tone, dots=True))
    ordered = [*lines[1:], lines[0]]
    title = f"{heading(name)}, exact match"
    return {
        "title": heading(name),
        "inside": stage_title(name),
        "svg": overlay.chart(title, ordered),
        "legend": overlay.legend(lines),
        "groups": groups,
        "rows": [
            {
                "step": step,
                "is_end": step == end,
                "shares": [scores[step].get(group, {}).get("accuracy") for group in groups],
            }
            for step in steps
        ],
    }
