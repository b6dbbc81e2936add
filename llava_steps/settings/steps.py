"""The table of the kinds of steps: name, module, inputs and resources of each rule.

Rules, targets, the sections of the configuration, the report and the plan follow from it. A kind
that is `each` dataset's or stage's makes a rule for every one of them, named `<dataset>_<kind>` or
`<stage>_<kind>`. A new step needs a line here, a settings class, and the module named in `module`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class StepDeclaration:
    """A kind of step."""

    kind: str
    """Name of the rule, or the end of its name where datasets or stages have their own."""
    module: str
    """Module of `llava_steps` that it runs."""
    feeds: Mapping[str, str] = field(default_factory=dict)
    """Source field -> kind of rule whose result is used when the configuration leaves it empty; or
    DATA, START: what the stage reads and what it starts from."""
    each: Literal["", "dataset", "stage"] = ""
    """What has a rule of this kind each; empty: the run has one."""
    section: str = ""
    """Section of the configuration; empty: named like the kind."""
    after: str = ""
    """Kind of rule that must succeed first, although its result is not read."""
    threads: int | str = 1
    """Cores of its job, or the setting with their number."""
    optional: bool = False
    """Whether a run has it only if its configuration enables it."""
    result: bool = False
    """Whether it is a goal of a run: `all` requests these."""
    summary: str = ""
    """The description in `snakemake --list-rules`."""


DATA = "data of the stage"
"""In `feeds`: the prepared dataset of a stage, or the blend of several."""
START = "start of the stage"
"""In `feeds`: the checkpoint that a stage starts from."""

_OF_STAGE = {"tokenizer_load_dir": "hf_model", "data_path": DATA}

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
        each="dataset",
        threads="workers",
        summary="Raw images and conversations to tar shards.",
    ),
    StepDeclaration(
        "energon_dataset",
        "prepare_energon",
        {"tar_dir": "tar_shards"},
        each="dataset",
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
        "blend",
        "blend",
        each="stage",
        optional=True,
        summary="The datasets of a stage, with their shares, as one blend file.",
    ),
    StepDeclaration(
        "audit",
        "audit",
        _OF_STAGE,
        each="stage",
        optional=True,
        summary="The dataset of a stage, read as training will see it.",
    ),
    StepDeclaration(
        "checkpoint",
        "train",
        {"megatron_load_dir": START, **_OF_STAGE},
        each="stage",
        section="stages",
        after="audit",
        threads="gpus",
        summary="Training of a stage.",
    ),
    StepDeclaration(
        "export",
        "megatron_to_hf",
        {"megatron_dir": "checkpoint", "tokenizer_dir": "hf_model"},
        each="stage",
        section="hf_export",
        optional=True,
        summary="Checkpoint of a stage to Hugging Face safetensors, for evaluation.",
    ),
    StepDeclaration(
        "hf_export",
        "megatron_to_hf",
        {"megatron_dir": "checkpoint", "tokenizer_dir": "hf_model"},
        result=True,
        summary="Checkpoint of the last stage to Hugging Face safetensors.",
    ),
    StepDeclaration(
        "evaluation",
        "evaluate",
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
    StepDeclaration("report", "report", result=True, summary="Report page of the run."),
    StepDeclaration(
        "comparison",
        "compare",
        optional=True,
        result=True,
        summary="Scores and losses of the variants of a sweep.",
    ),
)

STEPS: dict[str, StepDeclaration] = {step.kind: step for step in _STEPS}
"""By kind, in an order in which they can run. The report, last, reads all of them."""


def modules() -> list[str]:
    """The step modules, with the package, in the order of a run."""
    return [f"llava_steps.{module}" for module in dict.fromkeys(s.module for s in STEPS.values())]
