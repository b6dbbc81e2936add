"""Questions and answers about digits, in English and Japanese, as LLaVA conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LANGS = ("en", "ja")
ABOUT_ONE_SCAN = ("what_digit", "odd_even", "what_follows")
TWO_SCANS = "which_larger"
TEXT_ONLY = "text_only"
IMAGE = "<image>"

QUESTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("what_digit", "en"): (
        "What digit is this?",
        "Which digit is written here?",
        "What number do you see?",
        "Read the digit in the picture.",
    ),
    ("what_digit", "ja"): (
        "この数字は何ですか？",
        "画像に書かれた数字を答えてください。",
        "何の数字が見えますか？",
        "この手書きの数字を読んでください。",
    ),
    ("odd_even", "en"): (
        "Is it odd or even?",
        "Is this digit odd or even?",
        "Tell me whether the number is odd or even.",
    ),
    ("odd_even", "ja"): (
        "奇数ですか、偶数ですか？",
        "この数字は奇数ですか、それとも偶数ですか？",
        "奇数か偶数かを答えてください。",
    ),
    ("what_follows", "en"): (
        "What number follows it?",
        "Which number comes next?",
        "Add one to this digit.",
    ),
    ("what_follows", "ja"): (
        "次の数字は何ですか？",
        "この数字の次に来る数は何ですか？",
        "この数字に1を足してください。",
    ),
    ("which_larger", "en"): (
        "Which of the two digits is larger?",
        "Which picture shows the larger digit?",
    ),
    ("which_larger", "ja"): (
        "どちらの数字が大きいですか？",
        "大きい数字はどちらの画像ですか？",
    ),
}
# Text-only questions name the digit; the answer is that of the kind beside them.
TEXT_QUESTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "en": (
        ("what_follows", "What number follows {0}?"),
        ("odd_even", "Is {0} odd or even?"),
    ),
    "ja": (
        ("what_follows", "{0}の次の数字は何ですか？"),
        ("odd_even", "{0}は奇数ですか、偶数ですか？"),
    ),
}


def answer(kind: str, lang: str, digits: Sequence[int]) -> str:
    """The correct answer to a question of `kind` about `digits` (two for which_larger)."""
    first = digits[0]
    if kind == "what_digit":
        return f"It is {first}." if lang == "en" else f"{first}です。"
    if kind == "odd_even":
        odd = first % 2 == 1
        if lang == "en":
            return "It is odd." if odd else "It is even."
        return "奇数です。" if odd else "偶数です。"
    if kind == "what_follows":
        return f"{first + 1} follows." if lang == "en" else f"次は{first + 1}です。"
    if kind == TWO_SCANS:
        larger = 0 if first > digits[1] else 1
        return (
            ("The first one.", "The second one.")[larger]
            if lang == "en"
            else (
                "1枚目です。",
                "2枚目です。",
            )[larger]
        )
    raise ValueError(f"unknown kind of question: {kind!r}")


def turns(
    kinds: Sequence[str], lang: str, digits: Sequence[int], rng: np.random.Generator
) -> list[dict[str, str]]:
    """One question and answer per kind; the first question carries one <image> per digit."""
    out: list[dict[str, str]] = []
    for kind in kinds:
        wordings = QUESTIONS[kind, lang]
        question = wordings[int(rng.integers(len(wordings)))]
        prefix = f"{IMAGE}\n" * len(digits) if not out else ""
        out.append({"from": "human", "value": prefix + question})
        out.append({"from": "gpt", "value": answer(kind, lang, digits)})
    return out


def text_turns(lang: str, digit: int, which: int) -> list[dict[str, str]]:
    """A conversation without an image: text question number `which` about `digit`."""
    kind, question = TEXT_QUESTIONS[lang][which % len(TEXT_QUESTIONS[lang])]
    return [
        {"from": "human", "value": question.format(digit)},
        {"from": "gpt", "value": answer(kind, lang, [digit])},
    ]


def record(
    name: str, kind: str, lang: str, conversations: list[dict[str, str]], images: Sequence[str]
) -> dict[str, Any]:
    """One entry of a LLaVA JSON file; `image` is a string, a list of two, or absent."""
    sample: dict[str, Any] = {"id": name}
    if images:
        sample["image"] = images[0] if len(images) == 1 else list(images)
    return sample | {"conversations": conversations, "kind": kind, "lang": lang}


def training_samples(
    scans: Sequence[int], digits: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    """The training file: `scans` are scan numbers, `digits` the digit of every scan of the set.

    Two conversations per scan (one in each language), 40 % of them with several turns; one pair of
    scans for every third scan; a text-only sample for every tenth. Shuffled, ids in file order.
    """
    rng = np.random.default_rng([seed, 1])
    drafts: list[tuple[str, str, list[dict[str, str]], list[str]]] = []
    for position, scan in enumerate(scans):
        for lang in LANGS:
            if rng.random() < 0.4:
                kinds = ["what_digit", *rng.permutation(ABOUT_ONE_SCAN[1:]).tolist()]
                kind = "multi_turn"
            else:
                kinds = [str(rng.choice(ABOUT_ONE_SCAN, p=[0.5, 0.25, 0.25]))]
                kind = kinds[0]
            drafts.append((kind, lang, turns(kinds, lang, [digits[scan]], rng), [image_name(scan)]))
        if position % 3 == 0:
            drafts.append(_pair(scan, scans, digits, LANGS[position // 3 % 2], rng))
        if position % 10 == 0:
            lang = LANGS[position // 10 % 2]
            text = text_turns(lang, int(rng.integers(10)), int(rng.integers(2)))
            drafts.append((TEXT_ONLY, lang, text, []))
    order = rng.permutation(len(drafts))
    return [
        record(f"train-{n:05d}", kind, lang, talk, images)
        for n, (kind, lang, talk, images) in enumerate(drafts[i] for i in order)
    ]


def heldout_samples(scans: Sequence[int], digits: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """The held-out file: one question per sample; every scan in every kind and language.

    Pairs for every second scan and both languages; each text-only question about each digit.
    """
    rng = np.random.default_rng([seed, 2])
    samples: list[dict[str, Any]] = []
    for lang in LANGS:
        for kind in ABOUT_ONE_SCAN:
            for scan in scans:
                talk = turns([kind], lang, [digits[scan]], rng)
                samples.append(
                    record(f"{kind}-{lang}-{scan:04d}", kind, lang, talk, [image_name(scan)])
                )
        for scan in scans[::2]:
            kind, _, talk, images = _pair(scan, scans, digits, lang, rng)
            samples.append(record(f"{kind}-{lang}-{scan:04d}", kind, lang, talk, images))
        for which in range(len(TEXT_QUESTIONS[lang])):
            for digit in range(10):
                talk = text_turns(lang, digit, which)
                name = f"{TEXT_ONLY}-{lang}-{which}{digit}"
                samples.append(record(name, TEXT_ONLY, lang, talk, []))
    return samples


def image_name(scan: int) -> str:
    """Path of a scan's image, relative to the JSON files."""
    return f"images/{scan:04d}.jpg"


def _pair(
    scan: int, scans: Sequence[int], digits: Sequence[int], lang: str, rng: np.random.Generator
) -> tuple[str, str, list[dict[str, str]], list[str]]:
    """A two-image question about `scan` and another scan of the same split with another digit."""
    other = scan
    while digits[other] == digits[scan]:
        other = scans[int(rng.integers(len(scans)))]
    both = [scan, other] if rng.random() < 0.5 else [other, scan]
    talk = turns([TWO_SCANS], lang, [digits[n] for n in both], rng)
    return TWO_SCANS, lang, talk, [image_name(n) for n in both]
