"""What a stage starts from, which parts of the model it trains, and what the model must be."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import NonNegativeInt as Count
from pydantic import model_validator

from llava_steps.settings.fields import StepConfig, source, value


class Model(StepConfig):
    """The weights and data that a stage starts from, and the parts that it trains."""

    stage: Literal[1, 2] = value(1, "1: projector; 2: projector and language model")
    megatron_load_dir: str = source("", "Megatron checkpoint to start from", optional=True)
    init: bool = value(
        False,
        "draw all weights anew instead of reading megatron_load_dir, which is then not needed; "
        "what is frozen stays as drawn",
    )
    tokenizer_load_dir: str = source("", "HF directory with tokenizer, processor and config")
    data_path: str = source("", "energon dataset, or the YAML file of a blend of them")

    freeze_vision: bool = value(True, "keep the vision tower as it is")
    freeze_projector: bool = value(False, "keep the projector as it is")
    freeze_lm: bool | None = value(
        None, "keep the language model as it is; unless given, true in stage 1 and false in stage 2"
    )

    @model_validator(mode="before")
    @classmethod
    def _frozen_by_stage(cls, given: Any) -> Any:
        # Settled here, so that the same training has the same settings however it is asked for.
        if isinstance(given, dict) and given.get("freeze_lm") is None:
            return given | {"freeze_lm": given.get("stage", 1) == 1}
        return given

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if self.freeze_vision and self.freeze_projector and self.freeze_lm:
            raise ValueError("everything is frozen: there is nothing to train")
        return self


class Expected(StepConfig):
    """What the model must be, for those who want to be refused otherwise."""

    image_token_id: Count | None = value(
        None, "refuse to train unless this is the id of <image> in tokenizer_load_dir"
    )
    pad_token_id: Count | None = value(
        None, "refuse to train unless this is the id of padding in tokenizer_load_dir"
    )
    no_add_class_token: bool = value(
        False, "refuse to train unless the model leaves the tower's class token out"
    )
