"""The samples of a step, and the processes that load them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt, model_validator

from llava_steps.settings.fields import StepConfig, quiet, value


class Batch(StepConfig):
    """Number, length and packing of the samples of a step."""

    micro_batch_size: PositiveInt = value(1, "samples in one forward pass of a rank")
    global_batch_size: PositiveInt = value(1, "samples of one optimizer step on all ranks")
    seq_length: PositiveInt = value(2048, "longest sample in tokens, image tokens included")
    too_long: Literal["refuse", "truncate"] = value(
        "refuse",
        "longer samples: refuse, with the name of the sample, or truncate after the last answer "
        "that fits",
    )
    packing: bool = value(False, "fill each microbatch with samples; micro_batch_size must be 1")
    pack_length: Count = value(0, "longest packed microbatch in tokens; 0: seq_length")
    pad_to: Literal["row", "budget"] = value(
        "row", "length of a packed microbatch: that of its samples (row), or pack_length (budget)"
    )

    @model_validator(mode="after")
    def _packing_fills_a_microbatch(self) -> Self:
        if self.packing and self.micro_batch_size != 1:
            raise ValueError(
                f"packing fills each microbatch: set micro_batch_size to 1, not "
                f"{self.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _packs_hold_every_sample(self) -> Self:
        if self.packing and 0 < self.pack_length < self.seq_length:
            raise ValueError(
                f"pack_length {self.pack_length} is below seq_length {self.seq_length}: a sample "
                "may not fit; raise pack_length"
            )
        return self

    @model_validator(mode="after")
    def _pack_options_are_for_packing(self) -> Self:
        if not self.packing and (self.pack_length or self.pad_to != "row"):
            raise ValueError("pack_length and pad_to need packing; set packing, or leave them out")
        return self


class Loader(StepConfig):
    """The processes that load samples."""

    num_workers: Count = quiet(2, "loader worker processes per rank")
    loader_timeout: PositiveInt = quiet(
        600, "seconds without a new sample after which a loader worker counts as failed"
    )
