"""Exact match of answers with their references, by question kind and language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_steps.evaluation.ask import Question

ALL = "all"


def right(question: Question, answer: str) -> bool:
    """Whether an answer equals the reference, white space at the ends aside."""
    return answer.strip() == question.reference.strip()


def by_kind(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """{"all" and each "kind/lang": {"accuracy": share of right answers, "questions": count}}."""
    marks: dict[str, list[bool]] = {ALL: []}
    for question, answer in zip(questions, answers, strict=True):
        for group in (ALL, question.group):
            marks.setdefault(group, []).append(right(question, answer))
    return {
        group: {"accuracy": sum(found) / len(found), "questions": len(found)}
        for group, found in marks.items()
    }


def some(questions: Sequence[Question], answers: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The first `count` questions of each group with reference and answer."""
    seen: dict[str, int] = {}
    shown = []
    for question, answer in zip(questions, answers, strict=True):
        seen[question.group] = seen.get(question.group, 0) + 1
        if seen[question.group] <= count:
            shown.append(
                {
                    "id": question.id,
                    "group": question.group,
                    "question": question.turns[-1]["content"],
                    "reference": question.reference,
                    "answer": answer,
                    "right": right(question, answer),
                }
            )
    return shown


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: a row per question kind, a column per model, accuracies in per cent."""
    models = list(results)
    groups = list(results[models[0]])
    rows = [
        ["questions", "number", *(name.replace("_", " ") for name in models)],
        ["---", "---:", *("---:" for _ in models)],
    ]
    for group in groups[1:] + groups[:1]:
        number = results[models[0]][group]["questions"]
        shares = [f"{results[name][group]['accuracy']:.1%}" for name in models]
        rows.append([group, str(number), *shares])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
