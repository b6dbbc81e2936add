"""What a stage keeps, and when it saves."""

from __future__ import annotations

from typing import Self

from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt, model_validator

from llava_steps.settings.fields import StepConfig, quiet, value


class Checkpoint(StepConfig):
    """What checkpoints hold, and whether the training is one that a checkpoint continues."""

    load_optim: bool = value(
        False,
        "go on with the training that megatron_load_dir was saved by: optimizer, step and place in "
        "the data too, in any parallel layout; a checkpoint inside an unfinished one will do",
    )
    save: bool = value(
        True,
        "keep the trained weights; without it no checkpoint is written at any time, for trials "
        "that nothing follows and that start anew after a stop",
    )
    save_optim: bool = value(True, "keep the optimizer in the final checkpoint, for load_optim")
    dist_optim: bool = value(True, "optimizer sharded over data parallel ranks; always on")

    @model_validator(mode="after")
    def _optimizer_is_sharded(self) -> Self:
        if not self.dist_optim:
            raise ValueError(
                "dist_optim is always on; with one data parallel rank it costs nothing"
            )
        return self


class Saving(StepConfig):
    """When checkpoints are written, and how many are kept."""

    save_interval: PositiveInt = quiet(1000, "steps between checkpoints")
    async_save: bool = quiet(
        False,
        "train on while a checkpoint is digested and flushed; a kill meanwhile goes back to the "
        "one before",
    )
    keep_checkpoints: PositiveInt = quiet(2, "newest checkpoints that are kept while training")
    keep_every: Count = quiet(
        0, "also keep each checkpoint whose step is a multiple of this, in `.work/kept` at the end"
    )
