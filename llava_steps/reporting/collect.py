"""The content of the page, from the manifests and small files of a run's results.

Nothing is recomputed and no model is loaded. The part of a step that is not given is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_steps.reporting import answers, datasets, picture
from llava_steps.reporting.content import Run, manifest
from llava_steps.reporting.files import read_json
from llava_steps.reporting.kinds import Part
from llava_steps.reporting.training import processes as processes_of
from llava_steps.reporting.training import training
from llava_steps.store import attempts

BENCHMARKS = {"lmms_eval": "lmms-eval", "llm_jp_eval_mm": "llm-jp-eval-mm"}


def page(parts: Sequence[Part], title: str, samples: int) -> dict[str, Any]:
    """Everything the template needs.

    Args:
        parts: results of the run's rules.
        title: of the page.
        samples: sample answers shown for each kind of question.

    Raises:
        InputError: a file of a result is not as its step writes it.
    """
    run = Run.of(parts)
    manifests = {part.name: manifest(part) for part in run.parts}
    return {
        "title": title,
        "created": max((str(m.get("created", "")) for m in manifests.values()), default=""),
        "parameters": manifests.get("hf_model", {}).get("metrics", {}).get("parameters"),
        "pipeline": picture.picture(run),
        "evaluation": answers.evaluation(run, samples),
        "by_step": answers.by_step(run),
        "benchmarks": [
            read_json(part.item.path / "scores.json") | {"name": BENCHMARKS[part.kind]}
            for part in run.kind(*BENCHMARKS)
        ],
        "datasets": datasets.datasets(run),
        "audits": datasets.audits(run),
        "stages": [training(run, stage) for stage in run.stages],
        "certificates": _certificates(run),
        "costs": _costs(manifests),
        "provenance": [_origin(name, m) for name, m in manifests.items()],
        "packages": _packages(manifests),
    }


def _certificates(run: Run) -> list[dict[str, Any]]:
    """Of the import and of every export; those of the run's end are last."""
    certificates = []
    parts = run.kind("megatron_checkpoint", "export")
    for part in [*parts, *run.kind("hf_export")]:
        metrics = manifest(part).get("metrics", {})
        if "certificate" in metrics:
            forward = metrics.get("forward", {})
            numbers = [v for v in forward.values() if isinstance(v, int | float)]
            certificates.append(
                {
                    "name": part.name,
                    "counts": metrics["certificate"],
                    "forward": forward,
                    "largest": max(numbers, default=None),
                }
            )
    return certificates


def _costs(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    for name, facts in manifests.items():
        config = facts.get("config", {})
        processes = processes_of(config)
        wall = attempts.whole_s(facts)
        size = sum(int(file["size"]) for file in facts["files"])
        rows.append(
            {
                "name": name,
                "wall_s": wall,
                "processes": processes,
                "hours": wall * processes / 3600,
                "bytes": size,
                "attempts": facts.get("attempts", 1),
            }
        )
    longest = max((row["wall_s"] for row in rows), default=0.0) or 1.0
    for row in rows:
        row["share"] = row["wall_s"] / longest
    return {
        "rows": rows,
        "wall_s": sum(row["wall_s"] for row in rows),
        "hours": sum(row["hours"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
    }


def _origin(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("fingerprint", "content", "code", "image", "created", "attempts")
    return {
        "name": name,
        "facts": [(key, manifest[key]) for key in keys if manifest.get(key)],
        "inputs": [(key, row["path"], row["digest"]) for key, row in manifest["inputs"].items()],
        "config": manifest.get("config", {}),
        "files": len(manifest["files"]),
    }


def _packages(manifests: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Each package with all versions that made a part of the run, usually one."""
    packages: dict[str, list[str]] = {}
    for facts in manifests.values():
        for package, version in facts.get("packages", {}).items():
            versions = packages.setdefault(package, [])
            if version not in versions:
                versions.append(version)
    return list(packages.items())
