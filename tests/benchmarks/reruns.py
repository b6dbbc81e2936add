"""Change settings of a finished run, one or two at a time: just what they feed is computed again.

    python -m tests.benchmarks.reruns --changes 500

Stub steps, real workflow, real store. Every key of every section is changed alone; then pairs of a
key with one of the audit or of the stage that it belongs to, drawn at random, until there are
`--changes`. Which steps must be computed is concluded here from a table of its own. Each change
starts from a copy of the same finished run. The last line is JSON; the exit code is 1 when a change
computed anything else.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from llava_steps.core.errors import ConfigError
from llava_steps.settings import cli, load
from llava_steps.settings.fields import facts
from tests.helpers.sections import section as section_of
from tests.helpers.sections import sections
from tests.workflow.project import Project, make_project

DIRECT = {
    "demo_assets": ["demo_assets"],
    "tar_shards": ["tar_shards"],
    "energon_dataset": ["energon_dataset"],
    "hf_model": ["hf_model"],
    "megatron_checkpoint": ["megatron_checkpoint"],
    "audit": ["stage1_audit", "stage2_audit"],
    "stage1": ["stage1_checkpoint"],
    "stage2": ["stage2_checkpoint"],
    "hf_export": ["stage1_export", "hf_export"],
    "evaluation": ["evaluation"],
    "lmms_eval": ["lmms_eval"],
    "llm_jp_eval_mm": ["llm_jp_eval_mm"],
    "report": ["report"],
}
"""Section -> steps whose settings it holds."""

READS = [
    ("tar_shards", "tar_shards.source", "demo_assets"),
    ("energon_dataset", "energon_dataset.tar_dir", "tar_shards"),
    ("hf_model", "hf_model.vision_tower", "demo_assets"),
    ("hf_model", "hf_model.text_model", "demo_assets"),
    ("megatron_checkpoint", "megatron_checkpoint.hf_dir", "hf_model"),
    ("stage1_audit", "stage1.tokenizer_load_dir", "hf_model"),
    ("stage1_audit", "stage1.data_path", "energon_dataset"),
    ("stage1_checkpoint", "stage1.megatron_load_dir", "megatron_checkpoint"),
    ("stage1_checkpoint", "stage1.tokenizer_load_dir", "hf_model"),
    ("stage1_checkpoint", "stage1.data_path", "energon_dataset"),
    ("stage1_export", "hf_export.megatron_dir", "stage1_checkpoint"),
    ("stage1_export", "hf_export.tokenizer_dir", "hf_model"),
    ("stage2_audit", "stage2.tokenizer_load_dir", "hf_model"),
    ("stage2_audit", "stage2.data_path", "energon_dataset"),
    ("stage2_checkpoint", "stage2.megatron_load_dir", "stage1_checkpoint"),
    ("stage2_checkpoint", "stage2.tokenizer_load_dir", "hf_model"),
    ("stage2_checkpoint", "stage2.data_path", "energon_dataset"),
    ("hf_export", "hf_export.megatron_dir", "stage2_checkpoint"),
    ("hf_export", "hf_export.tokenizer_dir", "hf_model"),
    ("evaluation", "evaluation.data", "demo_assets"),
    ("evaluation", "evaluation.before", "hf_model"),
    ("evaluation", "evaluation.after_stage1", "stage1_export"),
    ("evaluation", "evaluation.after_stage2", "hf_export"),
    ("lmms_eval", "lmms_eval.model", "hf_export"),
    ("llm_jp_eval_mm", "llm_jp_eval_mm.model", "hf_export"),
]
"""(step, key, step whose result it reads unless the key is set); the report reads all results."""

RESULTS = ("hf_export", "evaluation", "lmms_eval", "llm_jp_eval_mm")
"""What a run is for; a step that none of these needs is left out."""

BASE = {
    "demo_assets": {"text_layers": 4},  # a virtual pipeline needs them
    "lmms_eval": {"tasks": ["mme"]},
    "llm_jp_eval_mm": {"tasks": {"ja-vg-vqa-500": "rougel"}},
}

SPECIAL: dict[str, dict[str, Any]] = {
    "part": {},  # one share of a value: never set in a run
    "parts": {},
    "remove_parts": {},
    "stage": {},  # given by the section
    "sample_type": {},  # has one value
    "projector_hidden_act": {},
    "dist_optim": {},
    "nodes": {},  # more than one needs Slurm
    "min_lr": {"min_lr": 1e-5},
    "columns": {"columns": {"question": "q"}},
    "background": {"background": "black"},
    "field_map": {"field_map": {"image": "png"}},
    "model_args": {"model_args": {"a": "b"}},
    "template_date": {"template_date": "2025-01-31"},
    "models": {"models": {"other": "other"}},
    "results": {"results": {"other": "other"}},
    "metrics": {"metrics": ["vqa_accuracy"]},
    "prompts": {"prompts": ["What is it?"]},
    "stage2.freeze_lm": {"freeze_lm": True},
    "freeze_projector": {"freeze_projector": True, "freeze_lm": False},
    "load_optim": {"load_optim": True, "megatron_load_dir": "other"},
    "gpus": {"gpus": 4, "global_batch_size": 256},
    "stage1.tensor_model_parallel": {"tensor_model_parallel": 1, "gpus": 1},
    "stage2.tensor_model_parallel": {"tensor_model_parallel": 2},
    "text_hidden_size": {"text_hidden_size": 64},
    "megatron_dir": {},  # gives both exports one value
    "pipeline_model_parallel": {
        "pipeline_model_parallel": 2, "tensor_model_parallel": 1, "gpus": 2,
    },
    "virtual_pipeline": {
        "virtual_pipeline": 2, "pipeline_model_parallel": 2, "tensor_model_parallel": 1, "gpus": 2,
        "global_batch_size": 256,
    },
    "pipeline_split": {
        "pipeline_split": "even", "pipeline_model_parallel": 2, "tensor_model_parallel": 1,
    },
    "sequence_parallel": {"sequence_parallel": True, "tensor_model_parallel": 2},
    "micro_batch_size": {"micro_batch_size": 16},
    "global_batch_size": {"global_batch_size": 128},
    "packing": {"packing": True, "micro_batch_size": 1},
    "pack_length": {"packing": True, "micro_batch_size": 1, "pack_length": 300},
    "pad_to": {"packing": True, "micro_batch_size": 1, "pad_to": "budget"},
    "decay_steps": {"decay_steps": 9, "lr_schedule": "wsd"},
    "lr_schedule": {"lr_schedule": "linear"},
    "vision_lr": {"vision_lr": 1e-4, "freeze_vision": False},
    "projector_lr": {"projector_lr": 1e-4},
    "lm_lr": {"lm_lr": 1e-4, "freeze_lm": False},
    "lora_rank": {"lora_rank": 4, "freeze_lm": False},
    "lora_targets": {"lora_targets": ["linear_qkv"]},
    "overlap_param_gather": {"overlap_param_gather": True, "overlap_grad_reduce": True},
    "bucket_size": {"bucket_size": 9, "overlap_grad_reduce": True},
    "precision": {"precision": "bf16"},
    "flash_attention": {"flash_attention": "torch"},
    "compile": {"compile": "none"},
    "fp8": {"fp8": True, "precision": "bf16", "layer_spec": "te"},
    "fp8_recipe": {"fp8_recipe": "blockwise", "fp8": True, "precision": "bf16",
                   "layer_spec": "te"},
    "layer_spec": {"layer_spec": "local"},
    "skip_train_iteration_range": {"skip_train_iteration_range": ["3-4"]},
    "spike_factor": {"spike_factor": 2.0},
    "exit_before": {"exit_before": 5.0},
    "gpu_ids": {"gpu_ids": "0,1"},
}  # fmt: skip
"""Keys whose change needs others, or a value that cannot be guessed from the type."""


@dataclass(frozen=True)
class Change:
    """Settings of one section that differ from the finished run."""

    section: str
    key: str
    settings: Mapping[str, Any]
    recomputed: frozenset[str]
    """Steps that have other settings with it."""


def changes(project: Project) -> Iterator[Change]:
    """A change of every key that a run can have; AssertionError for one that it may not have."""
    config = load.load([project.root / "config/config.yaml", project.root / "base.yaml"])
    for section, model in sections():
        if section == "cluster":
            continue
        for key, info in model.model_fields.items():
            held = section_of(config, section)
            current = getattr(held, key)
            roles = {name: facts(field).role for name, field in model.model_fields.items()}
            audited = section == "audit" and key in ("seq_length", "too_long", "data_path",
                                                     "tokenizer_load_dir")  # fmt: skip
            special = SPECIAL.get(f"{section}.{key}", SPECIAL.get(key))
            if audited or special == {}:
                continue
            settings = special or {key: other_value(info, key, current)}
            different = [name for name, item in settings.items() if getattr(held, name) != item]
            assert key in different, f"{section}.{key} does not change"
            hit: set[str] = set()
            if any(roles[name] != "quiet" for name in different):
                hit.update(DIRECT[section])
            if section in ("stage1", "stage2") and {
                "seq_length", "too_long", "data_path", "tokenizer_load_dir",
            } & {*different}:  # fmt: skip
                hit.add(f"{section}_audit")
            yield Change(section, key, settings, frozenset(hit))
    for key, value in (("runtime", {"tar_shards": 7}), ("jobs", {"tar_shards": 2})):
        yield Change("cluster", key, {key: value}, frozenset())


def other_value(info: FieldInfo, key: str, current: Any) -> Any:
    """A value of the field's type that differs from the current one."""
    annotation = cli._plain(info.annotation)
    if facts(info).role == "source":
        return "other.json" if key in ("source", "data", "chat_template") else "other"
    if annotation is bool:
        return not current
    if get_origin(annotation) is Literal:
        return next(item for item in get_args(annotation) if item != current)
    if annotation is int:
        return (current or 0) + 1
    if annotation is float:
        return current / 2 if current else 0.25
    if annotation is str:
        return "x"
    if get_origin(annotation) is list:
        return [3, 1, 0] if "int" in str(annotation) or "Annotated" in str(annotation) else ["pope"]
    if get_origin(annotation) is dict:
        return {"other": "rougel"}
    raise AssertionError(f"{key}: no change is known for {annotation}")


def expected(some: Sequence[Change]) -> set[str]:
    """Steps that a run computes after these changes: with other settings, or other input."""
    given = {f"{change.section}.{key}" for change in some for key in change.settings}
    reads = [(step, other) for step, key, other in READS if key not in given]
    needed = {*RESULTS}
    while more := {other for step, other in reads if step in needed} - needed:
        needed |= more
    needed |= {f"{step[:6]}_audit" for step in needed if step.endswith("_checkpoint")} & {
        "stage1_audit", "stage2_audit",
    }  # fmt: skip
    found = {step for change in some for step in change.recomputed} & {*needed, "report"}
    while more := {step for step, other in reads if other in found and step in needed} - found:
        found |= more
    return found | ({"report"} if found else set())


def together(some: Sequence[Change]) -> dict[str, Any]:
    """The overlay of several changes."""
    merged: dict[str, Any] = {}
    for change in some:
        merged.setdefault(change.section, {}).update(change.settings)
    return merged


def pairs(singles: Sequence[Change], seed: int) -> Iterator[tuple[Change, Change]]:
    """Each key with each of the audit and of its stage, in random order, if they go together."""
    partners = [c for c in singles if c.section in ("audit", "stage1", "stage2")]
    both = [
        (a, b)
        for a, b in product(singles, partners)
        if (a.section, a.key) != (b.section, b.key)
        and (a.section == b.section or b.section == "audit" or a.section not in DIRECT
             or not a.section.startswith("stage"))
        and all(b.settings.get(key, item) == item for key, item in a.settings.items()
                if a.section == b.section)
    ]  # fmt: skip
    random.Random(seed).shuffle(both)
    yield from both


def valid(project: Project, overlay: Mapping[str, Any]) -> bool:
    """Whether a run can have these settings."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(dict(overlay), file)
        file.flush()
        try:
            load.load([project.root / "config/config.yaml", project.root / "base.yaml", file.name])
        except ConfigError:
            return False
    return True


def computed(finished: Project, overlay: Mapping[str, Any], place: Path) -> set[str]:
    """Steps that a copy of the finished run computes with the overlay."""
    copy = Project(shutil.copytree(finished.root, place / "project", symlinks=True))
    copy.forget_calls()
    copy.overlay(yaml.safe_dump(dict(overlay)))
    copy.snakemake("--cores", "2", "--configfile", "base.yaml", "overlay.yaml")
    return {
        "stage1_export" if "stage1_checkpoint" in call.get("megatron_dir", "") else call["step"]
        for call in copy.calls()
    }


def check(finished: Project, some: Sequence[Change]) -> str:
    """What is wrong with what a run computes after these changes; empty when nothing is."""
    wanted = expected(some)
    with tempfile.TemporaryDirectory(dir=finished.root.parent) as place:
        try:
            found = computed(finished, together(some), Path(place))
        except AssertionError as error:
            return str(error)
    return "" if found == wanted else f"computed {sorted(found)}, expected {sorted(wanted)}"


def main() -> int:
    """Print what is wrong and the JSON line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--changes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        finished = make_project(Path(place) / "finished")
        finished.overlay(yaml.safe_dump(BASE), "base.yaml")
        for name in ("other.json", "other/some.json"):
            (finished.root / name).parent.mkdir(exist_ok=True)
            (finished.root / name).write_text("[]")
        finished.snakemake("--cores", "2", "--configfile", "base.yaml")
        singles = [*changes(finished)]
        for change in singles:
            assert valid(finished, together([change])), f"{change.section}.{change.key}"
        random.Random(given.seed).shuffle(singles)
        cases: list[tuple[Change, ...]] = [(change,) for change in singles[: given.changes]]
        for pair in pairs(singles, given.seed):
            if len(cases) >= given.changes:
                break
            if valid(finished, together(pair)):
                cases.append(pair)
        right = 0
        # Spawned: each worker has its own server of Snakemake calls.
        with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
            found = pool.map(functools.partial(check, finished), cases)
            for case, wrong in zip(cases, found, strict=True):
                right += not wrong
                if wrong:
                    keys = " + ".join(f"{c.section}.{c.key}" for c in case)
                    print(f"{keys}: {wrong}", file=sys.stderr, flush=True)
    print(json.dumps({"changes": len(cases), "right": right}))
    return 0 if right == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
