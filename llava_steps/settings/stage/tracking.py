"""Progress of a stage: validation, logs, trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt

from llava_steps.settings.fields import StepConfig, quiet


class Validation(StepConfig):
    """Measurements on the val split."""

    eval_interval: Count = quiet(
        0,
        "steps between validations on the val split (loss, token accuracy), also at the end; 0: "
        "none",
    )
    eval_samples: PositiveInt = quiet(256, "largest number of samples of a validation")
    eval_answers: Count = quiet(
        0, "number of questions of the val split to answer (greedily) before each checkpoint"
    )
    eval_new_tokens: PositiveInt = quiet(32, "largest number of tokens of such an answer")


class Tracking(StepConfig):
    """Progress lines, labels and trackers."""

    log_interval: PositiveInt = quiet(1, "steps between progress lines")
    name: str = quiet("", "label of the run in logs and trackers")
    peak_tflops: float = quiet(
        0.0,
        "peak of a GPU in this precision, in 10^12 operations per second, to report the share that "
        "training uses (MFU); 0: from the GPU's name if it is known",
        ge=0,
    )
    wandb: bool = quiet(False, "log to Weights & Biases")
    wandb_mode: Literal["offline", "online"] = quiet(
        "offline", "keep in `.work/wandb`, or send to W&B at once; WANDB_MODE overrides it"
    )
    wandb_project: str = quiet("llava-steps", "W&B project")
    wandb_entity: str = quiet("", "W&B user or team; empty: your default")
    wandb_group: str = quiet("", "W&B group of runs")
    wandb_tags: list[str] = quiet([], "W&B tags, besides the stage and the language")
    tensorboard: bool = quiet(
        False, "TensorBoard files in `.work/tensorboard` (pip install 'llava-steps[tensorboard]')"
    )
    lang: Literal["", "jp", "en"] = quiet("", "main language, as a tag in trackers")
    slurm_job_id: str = quiet("", "job id in logs and trackers; empty: SLURM_JOB_ID")
    slurm_output_name: str = quiet("", "output file of the job, for logs and trackers")
