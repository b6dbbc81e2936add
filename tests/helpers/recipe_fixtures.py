"""The results of a run with named datasets and stages, made without running any step.

Datasets `pretrain`, `instruct` and `docs`; stages `stage1`, from it `stage3` and `sft`, and last
`stage2` from `sft`. Of `sft` the checkpoints of steps 20 and 40 were kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_steps.store.store import MANIFEST, read_manifest
from tests.helpers.report_fixtures import audit_files, audit_report
from tests.helpers.sealed import losses, scores, seal

STAGES = {"stage1": "", "stage3": "stage1", "sft": "stage1", "stage2": "sft"}
"""Stage -> the one that it starts from."""
SAMPLES = {"pretrain": 1000, "instruct": 2000, "docs": 30}


def make_recipe(root: Path) -> dict[str, Path]:
    """Results by the names of their rules."""
    made: dict[str, Path] = {}

    def put(name: str, step: str, files: dict[str, Any], metrics: dict[str, Any],
            reads: dict[str, str] | None = None, **config: Any) -> None:  # fmt: skip
        inputs = {key: read(made[rule]) for key, rule in (reads or {}).items()}
        made[name] = seal(root, name, step, files, metrics, inputs, **config)

    for name, count in SAMPLES.items():
        put(f"{name}_tar_shards", "tar_shards", {"0.tar": name},
            {"samples_in": count + 7, "samples_written": count, "samples_quarantined": 7,
             "shards": 3, "bytes": 5000, "quarantine_reasons": {f"bad in {name}": 7}})  # fmt: skip
        put(f"{name}_energon_dataset", "energon_dataset", {"0.tar": name},
            {"samples": {"train": count - 10, "val": 10}})  # fmt: skip
    put("hf_model", "hf_model", {"x": "w"}, {"parameters": 1_800_000})
    certificate = {"bytes": 3600, "hf_tensors": 498, "megatron_tensors": 368}
    put("megatron_checkpoint", "megatron_checkpoint", {"x": "m"}, {"certificate": certificate})
    blend = {
        "datasets.instruct": "instruct_energon_dataset",
        "datasets.docs": "docs_energon_dataset",
    }
    put("sft_blend", "blend", {"blend.yaml": "{}"}, {"samples": {"instruct": 2000, "docs": 30}},
        blend, weights={"instruct": 3.0, "docs": 1.0})  # fmt: skip
    for number, (stage, start) in enumerate(STAGES.items(), 1):
        seen = audit_report() | {"samples": 100 * number}
        put(f"{stage}_audit", "stage2_audit", audit_files(seen), seen)
        reads = {"megatron_load_dir": f"{start}_checkpoint" if start else "megatron_checkpoint"}
        if stage != "sft":
            reads["data_path"] = "pretrain_energon_dataset"
        put(f"{stage}_checkpoint", "stage2_checkpoint",
            {"metrics.jsonl": losses(2.0 + number, 60, validated=True)},
            {"steps": 60, "last_loss": 0.1 * number, "samples": 600, "tokens": 6000},
            reads, freeze_projector=False, train_steps=60)  # fmt: skip
        if stage == "stage2":
            continue
        put(f"{stage}_export", "hf_export", {"x": stage}, {"certificate": certificate},
            {"megatron_dir": f"{stage}_checkpoint"})  # fmt: skip
    put("hf_export", "hf_export", {"x": "last"}, {"certificate": certificate},
        {"megatron_dir": "stage2_checkpoint"})  # fmt: skip
    for step in (20, 40):
        put(f"sft_step{step}_export", "hf_export", {"x": f"{step}"}, {"certificate": certificate})
        share = {f"step{step}": scores(all=0.01 * step, what=0.2)}
        put(f"sft_step{step}_evaluation", "evaluation", {"results.json": share}, {"questions": 800})
    # In the order of the command line of `evaluate`: its own flags first, then --models.
    models = ("before", "after_stage1", "after_stage2", "after_stage3", "after_sft")
    results = {
        model: scores(all=0.125 * number, what=0.5, which=0.0)
        for number, model in enumerate(models)
    }
    answers = [{"id": "q", "group": "what", "question": "q", "reference": "r", "answer": "a",
                "right": False, "cut": True}]  # fmt: skip
    put("evaluation", "evaluation",
        {"results.json": results, "samples.json": dict.fromkeys(models, answers)},
        {"questions": 800})  # fmt: skip
    return made


def read(result: Path) -> dict[str, str]:
    """An input as the manifest of a step that reads a result names it."""
    manifest = read_manifest(result)
    assert manifest is not None, f"{result} has no {MANIFEST}"
    return {"path": str(result), "digest": manifest["content"]}


def flags(made: dict[str, Path]) -> list[str]:
    """Flags of `report` as a run gives them: those of its own first, in the order of the table."""
    own = ("stage1", "stage2")
    with_flag = {
        name: path for name, path in made.items()
        if name in ("hf_model", "megatron_checkpoint", "hf_export", "evaluation")
        or (name.startswith(own) and name.count("_") == 1)
    }  # fmt: skip
    named = [f"--results={name}={path}" for name, path in made.items() if name not in with_flag]
    return [*(f"--{n.replace('_', '-')}={path}" for n, path in with_flag.items()), *named]
