"""Settings of the steps that evaluate a model: `evaluate`, `lmms_eval` and `llm_jp_eval_mm`."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt, field_validator

from llava_steps.settings.fields import StepConfig, quiet, source, value


class Evaluation(StepConfig):
    """Exact-match accuracy and other scores of HF LLaVA directories on held-out data."""

    data: str = source(help="held-out LLaVA JSON or JSONL file", is_data=True)
    before: str = source("", "HF directory before training", optional=True)
    after_stage1: str = source("", "HF directory after stage 1", optional=True)
    after_stage2: str = source("", "HF directory after stage 2", optional=True)
    models: dict[str, str] = source({}, "further models, as NAME=HF directory", optional=True)
    max_new_tokens: PositiveInt = value(16, "largest number of tokens of an answer")
    metrics: list[Literal["vqa_accuracy", "rouge_l", "cider", "perplexity"]] = value(
        [],
        "scores besides exact match: vqa_accuracy, rouge_l, cider, perplexity (of the references)",
    )
    prompts: list[str] = value(
        [], "questions to each model about the first images of `data`; shown, not scored"
    )
    prompt_images: PositiveInt = value(4, "number of images for `prompts`")
    prompt_tokens: PositiveInt = value(64, "largest number of tokens of an answer to `prompts`")
    batch_size: PositiveInt = quiet(64, "questions answered together")
    samples_shown: Count = value(8, "sample answers kept per question kind")

    @field_validator("prompts")
    @classmethod
    def _prompts_are_text(cls, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            if not prompt.strip() or "<image>" in prompt:
                raise ValueError(
                    f"prompt {prompt!r}: remove <image>; the image is placed before the text"
                )
        return prompts


class LmmsEval(StepConfig):
    """Tasks of lmms-eval on the export; without tasks the step is left out."""

    model: str = source("", "HF LLaVA directory")
    tasks: list[str] = value(
        [], "tasks, groups and tags of lmms-eval, such as mme or pope; empty: the step is left out"
    )
    task_files: str = source(
        "", "folder with your own tasks, for its --include_path", optional=True, is_data=True
    )
    limit: Count = value(0, "questions of each task; 0: all")
    model_args: dict[str, str] = value({}, "further --model_args, as NAME=VALUE")
    python: str = quiet("", "Python of the environment that has lmms-eval; empty: this one")


class LlmJpEvalMm(StepConfig):
    """Tasks of llm-jp-eval-mm on the export; without tasks the step is left out."""

    model: str = source("", "HF LLaVA directory")
    tasks: dict[str, str] = value(
        {},
        "tasks of llm-jp-eval-mm with their metrics, separated by commas, such as "
        "ja-vg-vqa-500=rougel; empty: the step is left out",
    )
    limit: Count = value(0, "questions of each task; 0: all")
    max_new_tokens: PositiveInt = value(256, "largest number of tokens of an answer")
    judge_model: str = value("", "judge model, for metrics that need one")
    batch_size: PositiveInt = quiet(1, "questions answered together")
    python: str = quiet("", "Python of the environment that has eval_mm; empty: this one")
