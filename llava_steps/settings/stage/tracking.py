"""What a stage shows of itself: looks at the val split, logs, trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt

from llava_steps.settings.fields import StepConfig, quiet


class Validation(StepConfig):
    """Measurements on the val split."""

    eval_interval: Count = quiet(
        0, "steps between looks at the val split: loss and token accuracy, also at the end; 0: none"
    )
    eval_samples: PositiveInt = quiet(256, "samples of the val split that are looked at, at most")
    eval_answers: Count = quiet(
        0, "questions of the val split that are answered, greedily, before each checkpoint"
    )
    eval_new_tokens: PositiveInt = quiet(32, "tokens of such an answer, at most")


class Tracking(StepConfig):
    """Progress lines, labels and trackers."""

    log_interval: PositiveInt = quiet(1, "steps between progress lines")
    name: str = quiet("", "label of the run in logs and trackers")
    peak_tflops: float = quiet(
        0.0,
        "what a GPU can do at most at this precision, in 10^12 operations a second, for the share "
        "of it that training uses (MFU); 0: known from the GPU's name, or else not told",
        ge=0,
    )
    wandb: bool = quiet(False, "log to Weights & Biases")
    wandb_mode: Literal["offline", "online"] = quiet(
        "offline", "keep in `.work/wandb`, or send to W&B at once; WANDB_MODE goes before it"
    )
    wandb_project: str = quiet("llava-steps", "W&B project")
    wandb_entity: str = quiet("", "W&B user or team; your default one unless given")
    wandb_group: str = quiet("", "W&B group of runs")
    wandb_tags: list[str] = quiet([], "W&B tags, beside the stage and the language")
    tensorboard: bool = quiet(
        False, "TensorBoard files in `.work/tensorboard` (pip install 'llava-steps[tensorboard]')"
    )
    lang: Literal["", "jp", "en"] = quiet("", "main language, a tag in trackers")
    slurm_job_id: str = quiet("", "job id in logs and trackers; SLURM_JOB_ID unless given")
    slurm_output_name: str = quiet("", "output file of the job, a note in logs and trackers")
