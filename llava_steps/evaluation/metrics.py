"""Scores of answers against their references, one number for each question.

| metric | range | definition |
|---|---|---|
| `vqa_accuracy` | 0 to 1 | normalised answer against the answers of several people, as in VQA |
| `rouge_l` | 0 to 1 | longest common subsequence of words, as in COCO captions (beta 1.2) |
| `cider` | 0 to 10 | n-grams weighted by how rare they are in all references (CIDEr-D) |

ROUGE-L and CIDEr are those of pycocoevalcap, on the words of evaluation/words.py. Perplexity needs
the model and is in evaluation/perplexity.py.
"""

from __future__ import annotations

import importlib.util
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import regex

from llava_steps.core.errors import ConfigError
from llava_steps.evaluation.words import words

if TYPE_CHECKING:
    from llava_steps.evaluation.ask import Question

LIBRARY = "pycocoevalcap"
_NEEDED = 3
"""People who must agree on an answer for it to count in full."""
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS)}}
_ARTICLES = {"a", "an", "the"}
# A point or comma between digits is part of a number.
_PUNCTUATION = regex.compile(r"(?<!\d)[.,]|[.,](?!\d)|[\p{P}\p{S}--[.,'’]]", regex.V1)
_APOSTROPHES = regex.compile(r"['’]")


def check(metrics: Sequence[str]) -> None:
    """Raise ConfigError when a metric's library is not installed."""
    wanted = [name for name in metrics if name in ("rouge_l", "cider")]
    if wanted and importlib.util.find_spec(LIBRARY) is None:
        raise ConfigError(
            f"evaluation.metrics: {', '.join(wanted)} need {LIBRARY}: pip install "
            "-c constraints.txt -e '.[metrics]', or leave them out"
        )


def score(metric: str, questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
    """The metric of every answer, in the questions' order."""
    return _SCORES[metric](questions, answers)


def plain(text: str) -> str:
    """An answer as VQA compares it: lower case, without punctuation and articles, numbers as
    digits, contractions without their apostrophe."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = _PUNCTUATION.sub(" ", _APOSTROPHES.sub("", folded))
    kept = (_NUMBERS.get(word, word) for word in bare.split() if word not in _ARTICLES)
    return " ".join(kept)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Share in [0, 1]: mean over the people of min(others who said the same / 3, 1).

    With the ten answers of VQA this is its accuracy. With n < 4 answers all n - 1 others must
    agree; with one answer it is equality.
    """
    said = plain(answer)
    same = [plain(reference) == said for reference in references]
    if len(same) == 1:
        return float(same[0])
    needed = min(_NEEDED, len(same) - 1)
    agree = sum(same)
    return sum(min((agree - own) / needed, 1.0) for own in same) / len(same)


def _vqa(questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
    pairs = zip(questions, answers, strict=True)
    return [vqa_accuracy(answer, question.references) for question, answer in pairs]


def _rouge_l(questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    return [
        float(rouge.calc_score([_spaced(answer)], [_spaced(r) for r in question.references]))
        for question, answer in zip(questions, answers, strict=True)
    ]


def _cider(questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
    from pycocoevalcap.cider.cider import Cider

    known = {i: [_spaced(r) for r in q.references] for i, q in enumerate(questions)}
    given = {i: [_spaced(answer)] for i, answer in enumerate(answers)}
    _, scores = Cider().compute_score(known, given)
    return [float(number) for number in scores]


def _spaced(text: str) -> str:
    return " ".join(words(text))


_SCORES: dict[str, Callable[[Any, Any], list[float]]] = {
    "vqa_accuracy": _vqa,
    "rouge_l": _rouge_l,
    "cider": _cider,
}
