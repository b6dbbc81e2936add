"""The weights a stage starts from, the parts of the model it trains, and checks of the model."""

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
        "start from random weights instead of megatron_load_dir, which is then not needed; "
        "frozen parts stay random",
    )
    tokenizer_load_dir: str = source("", "HF directory with tokenizer, processor and config")
    data_path: str = source(
        "", "energon dataset, or the YAML file of a blend of them", is_blend=True
    )

    freeze_vision: bool = value(True, "do not train the vision tower")
    freeze_projector: bool = value(False, "do not train the projector")
    freeze_lm: bool | None = value(
        None, "do not train the language model; default: true in stage 1, false in stage 2"
    )

    @model_validator(mode="before")
    @classmethod
    def _frozen_by_stage(cls, given: Any) -> Any:
        # Set here, so that equal trainings have equal settings, whether given or default.
        if isinstance(given, dict) and given.get("freeze_lm") is None:
            return given | {"freeze_lm": given.get("stage", 1) == 1}
        return given

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if self.freeze_vision and self.freeze_projector and self.freeze_lm:
            raise ValueError(
                "all parts are frozen: set freeze_vision, freeze_projector or freeze_lm to false"
            )
        return self


class Expected(StepConfig):
    """Optional checks: refuse a model with other ids or class token."""

    image_token_id: Count | None = value(
        None, "refuse to train unless this is the id of <image> in tokenizer_load_dir"
    )
    pad_token_id: Count | None = value(
        None, "refuse to train unless this is the id of padding in tokenizer_load_dir"
    )
    no_add_class_token: bool = value(
        False, "refuse to train unless the model drops the tower's class token"
    )
