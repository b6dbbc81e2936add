"""Stands in for llm-jp-eval-mm where that is not installed: the parts of its API that we call.

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


@dataclass
class ScorerConfig:
    docs: Any = None
    judge_model: str | None = None
    client: Any = None


@dataclass
class AggregateOutput:
    overall_score: float
    details: dict[str, float] = field(default_factory=dict)


class Squares:
    def __init__(self, config: TaskConfig) -> None:
        self.dataset = [{"colour": colour} for colour in COLOURS][: config.max_dataset_len]

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
        return AggregateOutput(mean, {"characters": mean, "most": max(scores)})


class ScorerRegistry:
    @classmethod
    def load_scorer(cls, name: str, config: ScorerConfig) -> Characters:
        if name != "characters":
            raise ValueError(f"Metric '{name}' is not supported.")
        return Characters(config)
