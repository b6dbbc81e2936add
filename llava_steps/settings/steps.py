"""The table of the steps of a run: name, module, inputs and resources of each rule.

Rules, targets, the sections of the configuration, the report and the plan follow from it. A new
step needs a line here, a settings class, and the module named in `module`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepDeclaration:
    """One rule of the workflow."""

    rule: str
    """Name of the rule, and of the directory that shows its result."""
    module: str
    """Module of `llava_steps` that it runs."""
    feeds: Mapping[str, str] = field(default_factory=dict)
    """Source field -> rule whose result is used when the configuration leaves it empty."""
    section: str = ""
    """Section of the configuration; empty: named like the rule."""
    after: str = ""
    """Rule that must succeed first, although its result is not read."""
    threads: int | str = 1
    """Cores of its job, or the setting with their number."""
    optional: bool = False
    """Whether a run has it only if its configuration enables it."""
    result: bool = False
    """Whether it is a goal of a run: `all` requests these."""
    stage: int = 0
    """The training stage that it belongs to; 0: none."""
    summary: str = ""
    """The description in `snakemake --list-rules`."""


def _data_of_stage() -> dict[str, str]:
    return {"tokenizer_load_dir": "hf_model", "data_path": "energon_dataset"}


_STEPS = (
    StepDeclaration(
        "demo_assets",
        "demo_assets",
        threads=2,
        optional=True,
        summary="Demo: digits, questions, tokenizer, tiny vision tower and language model.",
    ),
    StepDeclaration(
        "tar_shards",
        "shard_tars",
        threads="workers",
        summary="Raw images and conversations to tar shards.",
    ),
    StepDeclaration(
        "energon_dataset",
        "prepare_energon",
        {"tar_dir": "tar_shards"},
        threads="workers",
        summary="Tar shards to a megatron-energon dataset.",
    ),
    StepDeclaration(
        "hf_model",
        "build_hf",
        summary="Vision tower, language model and a new projector to one Hugging Face LLaVA.",
    ),
    StepDeclaration(
        "megatron_checkpoint",
        "hf_to_megatron",
        {"hf_dir": "hf_model"},
        summary="Hugging Face safetensors to a Megatron checkpoint.",
    ),
    StepDeclaration(
        "stage1_audit",
        "audit",
        _data_of_stage(),
        section="audit",
        stage=1,
        summary="Stage 1: read the dataset as training will see it.",
    ),
    StepDeclaration(
        "stage2_audit",
        "audit",
        _data_of_stage(),
        section="audit",
        stage=2,
        summary="Stage 2: read the dataset as training will see it.",
    ),
    StepDeclaration(
        "stage1_checkpoint",
        "train",
        {"megatron_load_dir": "megatron_checkpoint", **_data_of_stage()},
        section="stage1",
        after="stage1_audit",
        threads="gpus",
        stage=1,
        summary="Stage 1: train the projector.",
    ),
    StepDeclaration(
        "stage1_export",
        "megatron_to_hf",
        {"megatron_dir": "stage1_checkpoint", "tokenizer_dir": "hf_model"},
        section="hf_export",
        stage=1,
        summary="Stage 1 checkpoint to Hugging Face safetensors, for evaluation.",
    ),
    StepDeclaration(
        "stage2_checkpoint",
        "train",
        {"megatron_load_dir": "stage1_checkpoint", **_data_of_stage()},
        section="stage2",
        after="stage2_audit",
        threads="gpus",
        stage=2,
        summary="Stage 2: train the projector and the language model.",
    ),
    StepDeclaration(
        "hf_export",
        "megatron_to_hf",
        {"megatron_dir": "stage2_checkpoint", "tokenizer_dir": "hf_model"},
        result=True,
        stage=2,
        summary="Stage 2 checkpoint to Hugging Face safetensors.",
    ),
    StepDeclaration(
        "evaluation",
        "evaluate",
        {"before": "hf_model", "after_stage1": "stage1_export", "after_stage2": "hf_export"},
        threads=2,
        result=True,
        summary="Scores on held-out data, and sample answers.",
    ),
    StepDeclaration(
        "lmms_eval",
        "lmms_eval",
        {"model": "hf_export"},
        threads=2,
        optional=True,
        result=True,
        summary="Scores of lmms-eval's tasks.",
    ),
    StepDeclaration(
        "llm_jp_eval_mm",
        "llm_jp_eval_mm",
        {"model": "hf_export"},
        threads=2,
        optional=True,
        result=True,
        summary="Scores of llm-jp-eval-mm's tasks.",
    ),
)

STEPS: dict[str, StepDeclaration] = {step.rule: step for step in _STEPS}
"""By rule, in an order in which they can run. The report, last, reads all of them."""
STEPS["report"] = StepDeclaration(
    "report", "report", {rule: rule for rule in STEPS}, summary="Report page of the run."
)


def section_of(rule: str) -> str:
    """Section of the configuration that holds the settings of a rule."""
    return STEPS[rule].section or rule


def modules() -> list[str]:
    """The step modules, with the package, in the order of a run."""
    return [f"llava_steps.{module}" for module in dict.fromkeys(s.module for s in STEPS.values())]
