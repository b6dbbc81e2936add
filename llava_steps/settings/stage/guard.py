"""Handling of bad steps, and time limits of a stage."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic import NonNegativeInt as Count

from llava_steps.settings.fields import StepConfig, quiet, value

StepRange = Annotated[str, Field(pattern=r"^[1-9]\d*-[1-9]\d*$")]


class Guard(StepConfig):
    """Steps that are skipped, rejected or rolled back."""

    skip_train_iteration_range: list[StepRange] = value(
        [],
        "steps to skip, counted from 1, both ends included, such as 100-110 300-400: their "
        "global batches are skipped, the schedule continues",
    )
    spike_factor: float = value(
        0.0,
        "a loss or gradient norm above this many times the median of the last 64 updates is "
        "treated like one that is not finite; 0: off",
        ge=0,
    )
    max_rejected_steps: Count = value(
        10,
        "number of steps with a loss or gradient that is not finite, whose update is skipped and "
        "whose samples are logged; at one more the training rolls back",
    )
    max_rollbacks: Count = value(
        1,
        "number of times that weights and optimizer return to the last checkpoint, while the "
        "stream of samples continues; one more ends the training with exit code 6",
    )

    @model_validator(mode="after")
    def _skipped_steps_are_ranges(self) -> Self:
        for text in self.skip_train_iteration_range:
            first, _, last = text.partition("-")
            if int(first) > int(last):
                raise ValueError(
                    f"skip_train_iteration_range {text} ends before it begins; swap its ends"
                )
        return self

    @model_validator(mode="after")
    def _spikes_stand_out(self) -> Self:
        if 0 < self.spike_factor <= 1:
            raise ValueError(f"spike_factor {self.spike_factor} must be above 1, or 0")
        return self


class TimeLimits(StepConfig):
    """Time limits that stop or end a training."""

    exit_before: float = quiet(
        0.0,
        "minutes from the start, reading inputs included, by which the training saves and ends "
        "with exit code 75; includes the time of the save; 0: no limit",
        ge=0,
    )
    stall_timeout: Count = quiet(
        60,
        "seconds without a new microbatch on any rank after which the job ends, with the stack "
        "of each process in its log; 0: no limit",
    )
    io_timeout: Count = quiet(
        1800,
        "the same for longer tasks: the start with the first step, saves, rolling back to a "
        "checkpoint; 0: no limit",
    )
