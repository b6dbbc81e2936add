"""Scores of answers, by question kind and language; exact match is always one of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_steps.evaluation.ask import Question

ALL = "all"
SHARES = ("accuracy", "vqa_accuracy", "rouge_l")
"""Metrics between 0 and 1, shown in per cent."""


def right(question: Question, answer: str) -> bool:
    """Whether an answer equals the reference, except for white space at its ends."""
    return answer.strip() == question.reference.strip()


def by_kind(
    questions: Sequence[Question],
    answers: Sequence[str],
    scores: Mapping[str, Sequence[float]] | None = None,
    surprise: Sequence[tuple[float, int]] | None = None,
) -> dict[str, Any]:
    """{"all" and each "kind/lang": {"accuracy": share of right answers, "questions": count, ...}}.

    Args:
        questions, answers: in the same order.
        scores: further metrics, a number for each question; groups get their means.
        surprise: (negative log-likelihood, tokens) of each reference; groups get `perplexity`,
            exp of the mean over their tokens.
    """
    members: dict[str, list[int]] = {ALL: []}
    for number, question in enumerate(questions):
        for group in (ALL, question.group):
            members.setdefault(group, []).append(number)
    marks = [right(q, answer) for q, answer in zip(questions, answers, strict=True)]
    results: dict[str, Any] = {}
    for group, numbers in members.items():
        count = len(numbers)
        row: dict[str, Any] = {"accuracy": sum(marks[i] for i in numbers) / count}
        row["questions"] = count
        for metric, values in (scores or {}).items():
            row[metric] = sum(values[i] for i in numbers) / count
        if surprise is not None:
            tokens = sum(surprise[i][1] for i in numbers)
            row["perplexity"] = math.exp(sum(surprise[i][0] for i in numbers) / tokens)
        results[group] = row
    return results


def chosen(questions: Sequence[Question], count: int) -> list[int]:
    """Numbers of the first `count` questions of each group, in order."""
    seen: Counter[str] = Counter()
    numbers = []
    for number, question in enumerate(questions):
        seen[question.group] += 1
        if seen[question.group] <= count:
            numbers.append(number)
    return numbers


def some(
    questions: Sequence[Question],
    answers: Sequence[str],
    count: int,
    cut: Collection[int] = (),
) -> list[dict[str, Any]]:
    """The first `count` questions of each group with reference and answer.

    Args:
        questions, answers: in the same order.
        count: rows of each group.
        cut: numbers of answers that ended at the largest number of tokens; their rows say `cut`.
    """
    return [
        {
            "id": questions[i].id,
            "group": questions[i].group,
            "question": questions[i].turns[-1]["content"],
            "reference": questions[i].reference,
            "answer": answers[i],
            "right": right(questions[i], answers[i]),
            **({"cut": True} if i in cut else {}),
        }
        for i in chosen(questions, count)
    ]


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of each metric, exact match first and without a heading."""
    names = [key for key in next(iter(results.values()))[ALL] if key != "questions"]
    parts = [table(results)]
    parts += [f"{name}\n\n{table(results, name)}" for name in names if name != "accuracy"]
    return "\n".join(parts)


def table(results: Mapping[str, Mapping[str, Any]], metric: str = "accuracy") -> str:
    """A Markdown table: a row per question kind, a column per model; accuracies in per cent."""
    form = "{:.1%}" if metric in SHARES else "{:.3f}"
    models = list(results)
    groups = list(results[models[0]])
    rows = [
        ["questions", "number", *(name.replace("_", " ") for name in models)],
        ["---", "---:", *("---:" for _ in models)],
    ]
    for group in groups[1:] + groups[:1]:
        number = results[models[0]][group]["questions"]
        shares = [form.format(results[name][group][metric]) for name in models]
        rows.append([group, str(number), *shares])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a Markdown table in columns of one width; all but the first are to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
