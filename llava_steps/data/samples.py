"""One sample as training sees it, and its form inside a tar.

A sample in a tar is a set of parts with a common key:

    {key}.jpg, {key}.1.jpg, ...   images, the files' own bytes
    {key}.txt                     first answer
    {key}.json                    {"question", "id", "conversations": [{"role", "content"}], ...}

`conversations` holds the whole dialogue with `<image>` where an image stands. Data in the seed's
layout has only `question`: it becomes one user turn, the image before the question, and one answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_steps.core.errors import InputError

PLACEHOLDER = "<image>"
"""Stands for an image in raw and stored conversations, whatever the model's token is."""

_IMAGE_PART = re.compile(r"(?:([1-9][0-9]*)\.)?jpg")


class SampleError(InputError):
    """One sample cannot be used; the message gives the reason without the sample's location."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    """`user` or `assistant`."""
    content: str
    """Text with `<image>` placeholders."""


@dataclass(frozen=True)
class Sample:
    """A conversation and the encoded images that its placeholders stand for, in order."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


def check_turns(turns: tuple[Turn, ...], images: int) -> None:
    """Raise SampleError unless the turns alternate, are not empty and name `images` images."""
    if not turns:
        raise SampleError("no turns")
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise SampleError(f"wrong role: turn {number} is {turn.role!r}, expected {expected!r}")
        if _lone_surrogate(turn.content):
            raise SampleError(f"lone surrogate in turn {number}")
        if turn.role == "assistant" and PLACEHOLDER in turn.content:
            raise SampleError(f"image placeholder in the answer of turn {number}")
        if not turn.content.strip():
            what = "answer" if turn.role == "assistant" else "question"
            raise SampleError(f"empty {what} in turn {number}")
    if len(turns) % 2:
        raise SampleError("the last turn is not an answer")
    placeholders = sum(turn.content.count(PLACEHOLDER) for turn in turns)
    if placeholders != images:
        raise SampleError(f"{placeholders} image placeholders for {images} images")


def question_of(turns: tuple[Turn, ...]) -> str:
    """The first question without its placeholders, as the seed's `question` field has it."""
    return turns[0].content.replace(PLACEHOLDER, "").strip()


def to_parts(sample: Sample) -> list[tuple[str, bytes]]:
    """(part name, bytes) of a checked sample in the order in which they stand in the tar.

    The image comes first, so that tools which look at a sample's first member see it.
    """
    parts = [("jpg" if n == 0 else f"{n}.jpg", data) for n, data in enumerate(sample.images)]
    parts.append(("txt", sample.turns[1].content.encode()))
    meta = {
        **sample.extra,
        "question": question_of(sample.turns),
        "id": sample.id,
        "images": len(sample.images),
        "conversations": [{"role": t.role, "content": t.content} for t in sample.turns],
    }
    text = json.dumps(meta, ensure_ascii=False, allow_nan=False, sort_keys=True)
    parts.append(("json", text.encode()))
    return parts


def from_parts(key: str, parts: Mapping[str, bytes]) -> Sample:
    """The sample stored under `key`.

    Args:
        key: key in the tar, used as id when the data has none.
        parts: part name (text after the key's dot) to bytes.

    Raises:
        SampleError: a part is missing or broken, or the conversation is not usable.
    """
    images = _images(parts)
    meta = _meta(parts)
    turns = _turns(meta, parts, len(images))
    check_turns(turns, len(images))
    known = {"question", "id", "images", "conversations"}
    extra = {name: value for name, value in meta.items() if name not in known}
    return Sample(str(meta.get("id", key)), turns, images, extra)


def _images(parts: Mapping[str, bytes]) -> tuple[bytes, ...]:
    numbered = {}
    for name, data in parts.items():
        if match := _IMAGE_PART.fullmatch(name):
            numbered[int(match[1] or 0)] = data
    if sorted(numbered) != list(range(len(numbered))):
        raise SampleError(f"image parts are not numbered from 0 on: {sorted(numbered)}")
    return tuple(numbered[number] for number in range(len(numbered)))


def _meta(parts: Mapping[str, bytes]) -> dict[str, Any]:
    if "json" not in parts:
        raise SampleError(f"no .json part; there are {sorted(parts)}")
    try:
        meta = json.loads(parts["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError(f"the .json part is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise SampleError("the .json part is not an object")
    return meta


def _turns(meta: dict[str, Any], parts: Mapping[str, bytes], images: int) -> tuple[Turn, ...]:
    if "conversations" not in meta:
        return _seed_turns(meta, parts, images)
    raw = meta["conversations"]
    if not isinstance(raw, list) or not all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in raw
    ):
        raise SampleError('`conversations` must be a list of {"role": text, "content": text}')
    return tuple(Turn(turn["role"], turn["content"]) for turn in raw)


def _seed_turns(meta: dict[str, Any], parts: Mapping[str, bytes], images: int) -> tuple[Turn, ...]:
    """One question and one answer, as `question` and `.txt` give them."""
    question = meta.get("question")
    if not isinstance(question, str):
        raise SampleError("the .json part has neither `conversations` nor a text `question`")
    if "txt" not in parts:
        raise SampleError("no .txt part with the answer")
    try:
        answer = parts["txt"].decode()
    except UnicodeDecodeError as error:
        raise SampleError(f"the .txt part is not UTF-8: {error}") from error
    if PLACEHOLDER not in question:
        question = f"{PLACEHOLDER}\n" * images + question
    return (Turn("user", question), Turn("assistant", answer))


def _lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
