"""Stands in for eval-mm 0.4.1 where that is not installed: the parts of its API that we call.

Its one task, `squares`, shows one coloured square a question and expects that its colour is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue")


@dataclass
class TaskConfig:
    max_dataset_len: int | None = None
    rotate_choices: bool = False


@dataclass
class ScorerConfig:
    docs: Any = None
    judge_model: str | None = None
    client: Any = None
    batch_size: int = 10
    random_choice: bool = False


@dataclass
class AggregateOutput:
    overall_score: float
    details: dict[str, Any] = field(default_factory=dict)


class Rows(list[dict[str, str]]):
    """A datasets.Dataset, as far as it is used."""

    def select(self, numbers: range) -> Rows:
        return Rows(self[number] for number in numbers)


class Squares:
    def __init__(self, config: TaskConfig) -> None:
        self.dataset = Rows({"colour": colour} for colour in COLOURS)
        if config.max_dataset_len is not None:
            self.dataset = self.dataset.select(range(config.max_dataset_len))

    def doc_to_id(self, doc: dict[str, str]) -> str:
        return f"the {doc['colour']} one"

    def doc_to_text(self, doc: dict[str, str]) -> str:
        return "<image>What colour is it?"

    def doc_to_visual(self, doc: dict[str, str]) -> list[Image.Image]:
        return [Image.new("RGBA", (40, 30), doc["colour"])]

    def doc_to_answer(self, doc: dict[str, str]) -> str:
        return doc["colour"]


class TaskRegistry:
    @classmethod
    def load_task(cls, name: str, config: TaskConfig) -> Squares:
        if name != "squares":
            raise ValueError(f"Task '{name}' is not supported.")
        return Squares(config)


class Characters:
    """The mean number of characters: a score that tells whose answers these were."""

    def __init__(self, config: ScorerConfig) -> None:
        self.config = config

    def score(self, refs: list[str], preds: list[str]) -> list[int]:
        assert len(refs) == len(preds) == len(self.config.docs)
        return [len(text) for text in preds]

    def aggregate(self, scores: list[int]) -> AggregateOutput:
        mean = sum(scores) / len(scores)
        details = {"mean_characters": mean, "most": max(scores), "config": {"by": 1}}
        return AggregateOutput(mean, details)


class Judged(Characters):
    """What the judge says, as a number."""

    def score(self, refs: list[str], preds: list[str]) -> list[int]:
        assert self.config.client is not None
        assert self.config.judge_model is not None
        said = self.config.client.batch_generate_chat_response(
            [[{"role": "user", "content": pred}] for pred in preds],
            model_name=self.config.judge_model,
        )
        return [int(text or 0) for text in said]


class OpenAIChatAPI:
    """Gives each answer a 4; `mute` is the name of a model that its service does not have."""

    def batch_generate_chat_response(
        self, chat_messages_list: list[Any], model_name: str | None = None, **kwargs: Any
    ) -> list[str]:
        return ["" if model_name == "mute" else "4" for _ in chat_messages_list]


class ScorerRegistry:
    @classmethod
    def load_scorer(cls, name: str, config: ScorerConfig) -> Characters:
        scorers = {"mean-characters": Characters, "judged": Judged}
        if name not in scorers:
            raise ValueError(f"Metric '{name}' is not supported.")
        return scorers[name](config)
