"""Settings of `blend`: the datasets of a stage and their shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import PositiveInt, model_validator

from llava_steps.settings.fields import StepConfig, source, value
from llava_steps.settings.recipe import Share


class BlendFile(StepConfig):
    """Prepared datasets to one blend file, which a stage reads like a dataset."""

    NAME: ClassVar[str] = "blend.yaml"

    datasets: dict[str, str] = source({}, "prepared energon datasets, as NAME=DIRECTORY")
    weights: dict[str, float] = value(
        {}, "proportion of each dataset, as NAME=NUMBER; empty: an epoch contains each sample"
    )
    repetitions: dict[str, PositiveInt] = value(
        {}, "how often an epoch contains each sample of a dataset, as NAME=NUMBER; default: once"
    )
    max_turns: dict[str, PositiveInt] = value(
        {}, "first rounds of question and answer that are kept of a dataset, as NAME=NUMBER"
    )
    chat_templates: dict[str, str] = source(
        {}, "Jinja files used instead of the model's template, as NAME=FILE", optional=True
    )

    @classmethod
    def of_shares(cls, shares: Mapping[str, Share], paths: Mapping[str, str]) -> Self:
        """The settings for the data of a stage; `paths` are datasets that are not of the run."""
        return cls(
            datasets=dict(paths),
            weights={n: s.weight for n, s in shares.items() if s.weight is not None},
            repetitions={n: s.repetitions for n, s in shares.items() if s.repetitions is not None},
            max_turns={n: s.max_turns for n, s in shares.items() if s.max_turns is not None},
            chat_templates={n: s.chat_template for n, s in shares.items() if s.chat_template},
        )

    @model_validator(mode="after")
    def _shares_are_numbers(self) -> Self:
        wrong = [name for name, weight in self.weights.items() if weight <= 0]
        if wrong:
            raise ValueError(f"weights: {wrong[0]} has none above 0; leave the dataset out")
        if self.weights and self.repetitions:
            raise ValueError("weights mix without end, repetitions by epochs: give only one")
        return self
