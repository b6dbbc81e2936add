"""Metrics of an evaluation, and which of several values is the best."""

from __future__ import annotations

from collections.abc import Sequence

METRICS = {
    "accuracy": "Exact match",
    "vqa_accuracy": "VQA accuracy",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "perplexity": "Perplexity of the references",
}
IN_PERCENT = ("accuracy", "vqa_accuracy", "rouge_l")


def marks(metric: str, values: Sequence[float | None]) -> list[str]:
    """For each value `best`, `tied` if others are as good, or nothing; all are nothing if equal."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2:
        return [""] * len(values)
    best = min(known) if metric in ("perplexity", "loss") else max(known)
    mark = "best" if known.count(best) == 1 else "tied"
    return [mark if value == best else "" for value in values]
