"""The content of the page, from the manifests and small files of a run's results.

Nothing is recomputed and no model is loaded. The part of a step that is not given is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steps.core.format import count
from llava_steps.reporting import charts
from llava_steps.reporting.files import picture, read_json, read_rows, series
from llava_steps.reporting.scores import IN_PERCENT, METRICS
from llava_steps.store.store import Input

STAGES = {"stage1_checkpoint": "Stage 1", "stage2_checkpoint": "Stage 2"}
MODELS = {"before": "Before", "after_stage1": "Stage 1", "after_stage2": "Stage 2"}
BENCHMARKS = {"lmms_eval": "lmms-eval", "llm_jp_eval_mm": "llm-jp-eval-mm"}
SETTINGS = (
    "train_steps", "global_batch_size", "lr", "lr_schedule", "warmup_steps", "weight_decay",
    "precision", "tensor_model_parallel", "pipeline_model_parallel", "seq_length", "packing",
)  # fmt: skip
"""Settings of a stage that are shown beside its curves; provenance shows all of them."""
CURVES = (
    ("loss", "Loss", True),
    ("val_loss", "Validation loss", True),
    ("val_accuracy", "Validation accuracy by token", True),
    ("lr", "Learning rate", True),
    ("grad_norm", "Gradient norm", True),
    ("tokens_per_s", "Tokens per second", True),
)
SAMPLES, EXAMPLES = 36, 3
"""Largest numbers of sample answers and of samples with supervised text on the page."""

Inputs = Mapping[str, Input]


def page(inputs: Inputs, title: str, samples: int) -> dict[str, Any]:
    """Everything the template needs.

    Args:
        inputs: results of the run's rules, by the rules' names.
        title: of the page.
        samples: sample answers shown for each kind of question.

    Raises:
        InputError: a file of a result is not as its step writes it.
    """
    manifests = {name: item.manifest for name, item in inputs.items() if item.manifest}
    held_out = inputs.get("evaluation")
    return {
        "title": title,
        "created": max((str(m.get("created", "")) for m in manifests.values()), default=""),
        "parameters": manifests.get("hf_model", {}).get("metrics", {}).get("parameters"),
        "figures": _figures(manifests),
        "evaluation": None if held_out is None else _evaluation(held_out, samples),
        "benchmarks": [
            read_json(inputs[name].path / "scores.json") | {"name": words}
            for name, words in BENCHMARKS.items() if name in inputs
        ],
        "data": _data(inputs),
        "stages": [_stage(name, words, inputs[name]) for name, words in STAGES.items()
                   if name in inputs],
        "certificates": _certificates(manifests),
        "costs": _costs(manifests),
        "provenance": [_origin(name, m) for name, m in manifests.items()],
        "packages": _packages(manifests),
    }  # fmt: skip


def _evaluation(item: Input, samples: int) -> dict[str, Any]:
    results = read_json(item.path / "results.json")
    models = [name for name in MODELS if name in results]
    groups = list(results[models[0]])
    groups = [*groups[1:], groups[0]]
    tables = []
    for metric, words in METRICS.items():
        if metric not in results[models[0]]["all"]:
            continue
        best = max(results[m][g][metric] for m in models for g in groups) or 1.0
        whole = 1.0 if metric in IN_PERCENT else best
        rows = []
        for group in groups:
            values = [results[model][group][metric] for model in models]
            count = results[models[0]][group]["questions"]
            cells = [
                {"value": value, "share": value / whole, "best": value == _best(metric, values)}
                for value in values
            ]
            rows.append({"group": group, "questions": count, "cells": cells})
        tables.append({"metric": metric, "name": words, "rows": rows})
    prompts = item.path / "generations.json"
    return {
        "models": models,
        "names": MODELS,
        "tables": tables,
        "overall": [results[model]["all"]["accuracy"] for model in models],
        "questions": results[models[0]]["all"]["questions"],
        "samples": _answers(item.path, models, samples),
        "prompts": _prompts(item.path, models) if prompts.is_file() else [],
    }


def _best(metric: str, values: Sequence[float]) -> float:
    return min(values) if metric == "perplexity" else max(values)


def _answers(entry: Path, models: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The first samples of each kind, with the answer of every model."""
    samples = read_json(entry / "samples.json")
    seen: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for number, first in enumerate(samples[models[0]]):
        seen[first["group"]] = seen.get(first["group"], 0) + 1
        if seen[first["group"]] > count or len(rows) == SAMPLES:
            continue
        given = [
            {"model": MODELS[model], "text": row["answer"], "right": row["right"]}
            for model in models
            for row in [samples[model][number]]
        ]
        rows.append(
            first | {"answers": given, "pictures": _pictures(entry, first.get("images", []))}
        )
    return rows


def _prompts(entry: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    rows = read_json(entry / "generations.json")
    return [
        {
            "question": row["prompt"],
            "answers": [{"model": MODELS[m], "text": row["answers"][m]} for m in models],
            "pictures": _pictures(entry, row["images"]),
        }
        for row in rows[:SAMPLES]
    ]


def _pictures(entry: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    return [picture(entry / name) for name in names]


def _data(inputs: Inputs) -> dict[str, Any]:
    data: dict[str, Any] = {"shards": None, "reasons": [], "splits": None, "audits": []}
    if "tar_shards" in inputs:
        metrics = dict((inputs["tar_shards"].manifest or {}).get("metrics", {}))
        data["shards"] = metrics
        reasons: Mapping[str, int] = metrics.get("quarantine_reasons", {})
        data["reasons"] = sorted(reasons.items(), key=lambda row: -row[1])
    if "energon_dataset" in inputs:
        data["splits"] = (inputs["energon_dataset"].manifest or {}).get("metrics", {})
    seen: set[str] = set()
    for name in ("stage1_audit", "stage2_audit"):
        if name not in inputs:
            continue
        item = inputs[name]
        manifest = item.manifest or {}
        of = f"Stage {name[5]}"
        digest = json.dumps([manifest.get("metrics"), (manifest.get("inputs") or {})])
        if digest in seen:
            data["audits"][-1]["of"] = "Both stages"
            continue
        seen.add(digest)
        data["audits"].append(_audit(item, of))
    return data


def _audit(item: Input, of: str) -> dict[str, Any]:
    report = read_json(item.path / "report.json")
    shown = read_json(item.path / "examples.json")
    rows = [(r["from"], r["to"], r["samples"]) for r in report["lengths"]["histogram"]]
    return {
        "of": of,
        "report": report,
        "chart": charts.histogram("Samples by length", rows, "tokens"),
        "thumbnails": [
            {"picture": picture(item.path / row["image"]), "sample": short(row["sample"])}
            for row in shown["thumbnails"]
        ],
        "examples": [
            row | {"sample": short(row["sample"]), "pictures": _pictures(item.path, row["images"])}
            for row in shown["examples"][:EXAMPLES]
        ],
    }


def short(where: str) -> str:
    """Tar and key of a sample, without the directories before them."""
    return "/".join(where.split("/")[-2:])


def _stage(name: str, words: str, item: Input) -> dict[str, Any]:
    manifest = item.manifest or {}
    rows = read_rows(item.path / "metrics.jsonl")
    curves = []
    for key, title, from_zero in CURVES:
        xs, ys = series(rows, key)
        if xs:
            svg = charts.curve(f"{words}, {title}", xs, ys, f"tone-{name[5]}", from_zero)
            curves.append({"title": title, "svg": svg})
    config = manifest.get("config", {})
    metrics = manifest.get("metrics", {})
    return {
        "name": words,
        "kind": name[:6],
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
        "processes": _processes(config),
        "curves": curves,
        "left_out": metrics.get("steps", 0) - metrics.get("updates", metrics.get("steps", 0)),
        "attempts": manifest.get("attempts", 1),
        "wall_s": manifest.get("wall_s"),
    }


def _certificates(manifests: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    certificates = []
    for name in ("megatron_checkpoint", "stage1_export", "hf_export"):
        metrics = manifests.get(name, {}).get("metrics", {})
        if "certificate" in metrics:
            forward = metrics.get("forward", {})
            numbers = [v for v in forward.values() if isinstance(v, int | float)]
            certificates.append(
                {
                    "name": name,
                    "counts": metrics["certificate"],
                    "forward": forward,
                    "largest": max(numbers, default=None),
                }
            )
    return certificates


def _processes(config: Mapping[str, Any]) -> int:
    """Processes of a step; those without such settings have one."""
    return int(config.get("gpus", 1)) * int(config.get("nodes", 1))


def _costs(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    for name, manifest in manifests.items():
        config = manifest.get("config", {})
        processes = _processes(config)
        wall = float(manifest.get("wall_s", 0.0))
        size = sum(int(file["size"]) for file in manifest["files"])
        rows.append(
            {
                "name": name,
                "wall_s": wall,
                "processes": processes,
                "hours": wall * processes / 3600,
                "bytes": size,
                "attempts": manifest.get("attempts", 1),
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
    for manifest in manifests.values():
        for package, version in manifest.get("packages", {}).items():
            versions = packages.setdefault(package, [])
            if version not in versions:
                versions.append(version)
    return list(packages.items())


def _figures(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A short text for each box of the pipeline."""
    return {name: _figure(name, manifest["metrics"]) for name, manifest in manifests.items()}


def _figure(name: str, metrics: Mapping[str, Any]) -> str:
    match name:
        case "tar_shards":
            return f"{metrics['samples_written']:,} samples, {metrics['shards']} tars"
        case "energon_dataset":
            return f"{metrics['samples']['train']:,} to train on"
        case "hf_model":
            return f"{count(metrics['parameters'])} parameters"
        case "megatron_checkpoint":
            return f"{metrics['certificate']['megatron_tensors']} tensors"
        case "hf_export":
            return f"{metrics['certificate']['hf_tensors']} tensors"
        case "stage1_checkpoint" | "stage2_checkpoint":
            return f"{metrics['steps']:,} steps, loss {metrics['last_loss']:.3g}"
        case "evaluation":
            return f"{metrics['questions']:,} questions"
        case _:
            return ""
