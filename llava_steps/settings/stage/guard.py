"""What a stage does about bad steps, and the time that it may take."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic import NonNegativeInt as Count

from llava_steps.settings.fields import StepConfig, quiet, value

StepRange = Annotated[str, Field(pattern=r"^[1-9]\d*-[1-9]\d*$")]


class Guard(StepConfig):
    """Steps that are skipped, rejected or taken back."""

    skip_train_iteration_range: list[StepRange] = value(
        [],
        "steps to skip, counted from 1 with both ends, as 100-110 300-400: their global batches "
        "are passed over and the schedule goes on",
    )
    spike_factor: float = value(
        0.0,
        "a loss or gradient norm above this many times the median of the last 64 updates is "
        "treated like one that is not finite; 0 looks for no spikes",
        ge=0,
    )
    max_rejected_steps: Count = value(
        10,
        "steps whose loss or gradient is not finite: their update is left out, their samples are "
        "named; one step more than this and the training rolls back",
    )
    max_rollbacks: Count = value(
        1,
        "times that weights and optimizer go back to the last checkpoint, while the stream of "
        "samples goes on; one time more ends the training with exit code 6",
    )

    @model_validator(mode="after")
    def _skipped_steps_are_ranges(self) -> Self:
        for text in self.skip_train_iteration_range:
            first, _, last = text.partition("-")
            if int(first) > int(last):
                raise ValueError(f"skip_train_iteration_range {text} ends before it begins")
        return self

    @model_validator(mode="after")
    def _spikes_stand_out(self) -> Self:
        if 0 < self.spike_factor <= 1:
            raise ValueError(f"spike_factor {self.spike_factor} must be above 1, or 0")
        return self


class TimeLimits(StepConfig):
    """Limits after which a training stops or is ended."""

    exit_before: float = quiet(
        0.0,
        "minutes after its start, inputs included that are read first, at which the training has "
        "stopped in order, saved, with exit code 75; time for a save is set aside; 0 is no limit",
        ge=0,
    )
    stall_timeout: Count = quiet(
        60,
        "seconds without a further microbatch on any rank after which the job ends, with the stack "
        "of each process in its log; 0 waits for ever",
    )
    io_timeout: Count = quiet(
        1800,
        "the same for what takes longer: the start with the first step, saves, going back to a "
        "checkpoint; 0 waits for ever",
    )
