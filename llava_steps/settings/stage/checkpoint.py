"""Content, interval and number of a stage's checkpoints."""

from __future__ import annotations

from typing import Self

from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt, model_validator

from llava_steps.settings.fields import StepConfig, quiet, value


class Checkpoint(StepConfig):
    """Content of checkpoints, and whether the training continues another one."""

    load_optim: bool = value(
        False,
        "continue the training that saved megatron_load_dir: optimizer, step and position in the "
        "data too, in any parallel layout; also from a checkpoint of an unfinished training",
    )
    save: bool = value(
        True,
        "save checkpoints; without it none is ever written, for trials whose weights are not used "
        "and that start over after a stop",
    )
    save_optim: bool = value(True, "keep the optimizer in the final checkpoint, for load_optim")
    dist_optim: bool = value(True, "optimizer sharded over data parallel ranks; always on")

    @model_validator(mode="after")
    def _optimizer_is_sharded(self) -> Self:
        if not self.dist_optim:
            raise ValueError(
                "dist_optim is always on, at no cost with one data parallel rank: leave it out"
            )
        return self


class Saving(StepConfig):
    """When checkpoints are written, and how many are kept."""

    save_interval: PositiveInt = quiet(1000, "steps between checkpoints")
    async_save: bool = quiet(
        False,
        "continue training while a checkpoint is hashed and flushed; a training killed meanwhile "
        "resumes from the previous one",
    )
    keep_checkpoints: PositiveInt = quiet(2, "number of newest checkpoints kept while training")
    keep_every: Count = quiet(
        0, "also keep each checkpoint whose step is a multiple of this, in `.work/kept` at the end"
    )
