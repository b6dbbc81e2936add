"""The datasets of a run on its page: samples, quarantine, splits, and what the audits saw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llava_steps.reporting import charts
from llava_steps.reporting.content import Run, manifest, source
from llava_steps.reporting.files import picture, read_json
from llava_steps.reporting.kinds import Part
from llava_steps.settings.recipe import stage_title

EXAMPLES = 3
"""Largest number of samples with supervised text for each audit."""


def datasets(run: Run) -> list[dict[str, Any]]:
    """A row for each dataset that the run made or prepared; the only one may have no name."""
    rows: dict[str, dict[str, Any]] = {}
    for part in run.kind("tar_shards", "energon_dataset"):
        row = rows.setdefault(part.of, {"name": part.of, "shards": None, "reasons": []})
        metrics: Mapping[str, Any] = manifest(part).get("metrics", {})
        if part.kind == "tar_shards":
            reasons: Mapping[str, int] = metrics.get("quarantine_reasons", {})
            row["shards"] = metrics
            row["reasons"] = sorted(reasons.items(), key=lambda reason: -reason[1])
        else:
            row["splits"] = metrics["samples"]
    return [{"splits": {}, **row} for row in rows.values()]


def of_stage(run: Run, stage: Part) -> str:
    """The datasets that a training reads, with their shares; or the path of its data."""
    blend = run.one(f"{stage.of}_blend")
    if blend is None:
        dataset = source(stage, "data_path", run.kind("energon_dataset"))
        read = manifest(stage).get("inputs", {}).get("data_path")
        # The only dataset of a run may have no name.
        return dataset.of if dataset else str(read["path"]) if read else ""
    config = manifest(blend).get("config", {})
    weights, repeated = config.get("weights", {}), config.get("repetitions", {})
    return ", ".join(
        name
        + (f" (weight {weights[name]:g})" if name in weights else "")
        + (f" ({repeated[name]} times)" if repeated.get(name, 1) > 1 else "")
        for name in manifest(blend).get("metrics", {}).get("samples", {})
    )


def audits(run: Run) -> list[dict[str, Any]]:
    """What the audits saw; stages whose audits are equal are one row."""
    equal: dict[str, list[Part]] = {}
    order = [stage.name for stage in run.stages]
    ordered = sorted(
        run.kind("audit"), key=lambda part: order.index(part.of) if part.of in order else len(order)
    )
    for part in ordered:
        facts = manifest(part)
        digest = json.dumps([facts.get("metrics"), facts.get("inputs") or {}])
        equal.setdefault(digest, []).append(part)
    return [_audit(parts[0], _together(parts, len(ordered))) for parts in equal.values()]


def _together(parts: Sequence[Part], count: int) -> str:
    if len(parts) == count and count > 1:
        return "both stages" if count == 2 else "all stages"
    return ", ".join(stage_title(part.of) for part in parts)


def _audit(part: Part, of: str) -> dict[str, Any]:
    path = part.item.path
    report = read_json(path / "report.json")
    shown = read_json(path / "examples.json")
    rows = [(r["from"], r["to"], r["samples"]) for r in report["lengths"]["histogram"]]
    return {
        "of": of,
        "report": report,
        "chart": charts.histogram("Samples by length", rows, "tokens"),
        "thumbnails": [
            {"picture": picture(path / row["image"]), "sample": short(row["sample"])}
            for row in shown["thumbnails"]
        ],
        "examples": [
            row
            | {
                "sample": short(row["sample"]),
                "pictures": [picture(path / name) for name in row["images"]],
            }
            for row in shown["examples"][:EXAMPLES]
        ],
    }


def short(where: str) -> str:
    """Tar and key of a sample, without the directories before them."""
    return "/".join(where.split("/")[-2:])
