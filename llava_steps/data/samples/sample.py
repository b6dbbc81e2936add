"""One sample as training sees it, and its form inside a tar.

A sample in a tar is a set of parts with a common key:

    {key}.jpg, {key}.1.png, ...   images, the files' own bytes: jpg, png or webp
    {key}.txt                     first answer
    {key}.json                    {"question", "id", "conversations": [{"role", "content"}], ...}

`conversations` holds the whole dialogue with `<image>` where an image stands. Data in the seed's
layout has only a question and an answer, found by the dataset's field map: it becomes one user
turn, the image before the question, and one answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from llava_steps.core.errors import InputError
from llava_steps.data.energon.field_map import SEED, FieldMap, look_up
from llava_steps.data.samples import formats
from llava_steps.data.samples.unread import unread_field, unread_part, unread_placeholder

PLACEHOLDER = "<image>"
"""Stands for an image in raw and stored conversations, whatever the model's token is."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
RESERVED = frozenset({"question", "images", "conversations"})
"""Names in the .json part that the tar contract gives a meaning."""


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True)


class SampleError(InputError):
    """One sample cannot be used.

    The message is "reason: details" without the sample's location; the reason is the same for all
    samples with the same trouble, so that they can be counted.
    """

    @property
    def reason(self) -> str:
        """The part of the message before the first colon."""
        return str(self).partition(":")[0]


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


def parse_turns(raw: Any) -> tuple[Turn, ...]:
    """Turns from a list of {"role", "content"} or of LLaVA's {"from", "value"}.

    Raises:
        SampleError: another shape, or an unknown role.
    """
    if not isinstance(raw, list):
        raise SampleError("no conversation: `conversations` is not a list")
    turns = []
    for number, item in enumerate(raw):
        entry = item if isinstance(item, dict) else {}
        role, content = (
            entry.get("role", entry.get("from")),
            entry.get("content", entry.get("value")),
        )
        if not isinstance(role, str) or role not in ROLES:
            raise SampleError(f"wrong role: turn {number} is from {_short(role)}")
        if not isinstance(content, str):
            raise SampleError(f"not a text: turn {number} holds {_short(content)}")
        turns.append(Turn(ROLES[role], content))
    return tuple(turns)


def check_turns(turns: tuple[Turn, ...], images: int) -> None:
    """Raise SampleError unless the turns alternate, are not empty and name `images` images."""
    if not turns:
        raise SampleError("no conversation: it has no turns")
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise SampleError(f"wrong role: turn {number} is {turn.role}, expected {expected}")
        check_text(turn.content, f"turn {number}")
        if turn.role == "user" and (mark := unread_placeholder(turn.content)):
            raise SampleError(f"{mark[1:-1]} is not supported: turn {number} contains {mark}")
        if turn.role == "assistant" and PLACEHOLDER in turn.content:
            raise SampleError(f"image placeholder in an answer: turn {number}")
        if not turn.content.strip():
            what = "answer" if turn.role == "assistant" else "question"
            raise SampleError(f"empty {what}: turn {number}")
    if len(turns) % 2:
        raise SampleError("no last answer: the conversation ends with a question")
    placeholders = sum(turn.content.count(PLACEHOLDER) for turn in turns)
    if placeholders != images:
        raise SampleError(f"wrong number of image placeholders: {placeholders} for {images} images")


def check_text(text: str, where: str) -> None:
    """Raise SampleError when a text cannot be written as UTF-8."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"lone surrogate: {where}, character {error.start}") from error


def question_of(turns: tuple[Turn, ...]) -> str:
    """The first question without its placeholders, as the seed's `question` field has it."""
    return turns[0].content.replace(PLACEHOLDER, "").strip()


def to_parts(sample: Sample) -> list[tuple[str, bytes]]:
    """(part name, bytes) of a checked sample in the order of the tar.

    Raises:
        SampleError: an extra field cannot be written as JSON, or has a name that is taken.
    """
    parts = [(_image_part(number, data), data) for number, data in enumerate(sample.images)]
    parts.append(("txt", sample.turns[1].content.encode()))
    if taken := RESERVED & set(sample.extra):
        raise SampleError(f"reserved field: {sorted(taken)}; rename it")
    meta = {
        **sample.extra,
        "question": question_of(sample.turns),
        "id": sample.id,
        "images": len(sample.images),
        "conversations": [{"role": t.role, "content": t.content} for t in sample.turns],
    }
    try:
        parts.append(("json", _JSON.encode(meta).encode()))
    except UnicodeEncodeError as error:
        raise SampleError("lone surrogate: in a field besides the conversation") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise SampleError(f"not JSON: field {_unwritable(sample.extra)}") from error
    return parts


def _unwritable(extra: Mapping[str, Any]) -> str:
    """Name of the first field that JSON has no form for."""
    for name, value in extra.items():
        try:
            _JSON.encode({name: value})
        except (ValueError, TypeError, RecursionError):
            return ascii(name)
    return "id"


def from_parts(
    key: str, parts: Mapping[str, bytes], fields: FieldMap = SEED, question: str = ""
) -> Sample:
    """The sample stored under `key`.

    Args:
        key: key in the tar, used as id when the data has none.
        parts: part name (text after the key's dot) to bytes.
        fields: where image, question and answer are in data without `conversations`.
        question: question of samples that have none.

    Raises:
        SampleError: a part is missing or broken, or the conversation is not usable.
    """
    images = _images(parts, fields)
    if lost := unread_part(parts, lambda name: is_image_part(name, fields), text_parts(fields)):
        shown = ", ".join(fields.image_parts[:4])
        raise SampleError(f"{lost}; images are parts with the names {shown}")
    meta = _meta(parts)
    if "conversations" in meta:
        turns = parse_turns(meta["conversations"])
    else:
        turns = _seed_turns(parts, len(images), fields, question)
    check_turns(turns, len(images))
    extra = {name: meta[name] for name in meta if name not in RESERVED and name != "id"}
    if lost := unread_field(extra, len(images)):
        raise SampleError(lost)
    return Sample(str(meta.get("id", key)), turns, images, extra)


def is_image_part(name: str, fields: FieldMap = SEED) -> bool:
    """Whether a part of this name holds an image."""
    return _image_form(fields).fullmatch(name) is not None


def _image_part(number: int, data: bytes) -> str:
    """Name of the part of image `number`: by what the file is, not by what it is called."""
    name = formats.KEPT.get(formats.kind(data), "jpg")
    return f"{number}.{name}" if number else name


@cache
def text_parts(fields: FieldMap = SEED) -> frozenset[str]:
    """Names of the parts that question, answer and the other fields are read from."""
    return frozenset({"txt", "json", *(path[0] for path in (*fields.context, *fields.answers))})


@cache
def _image_form(fields: FieldMap) -> re.Pattern[str]:
    names = "|".join(re.escape(name) for name in fields.image_parts)
    return re.compile(rf"(?:([1-9][0-9]*)\.)?(?:{names})")


def _images(parts: Mapping[str, bytes], fields: FieldMap) -> tuple[bytes, ...]:
    form = _image_form(fields)
    numbered: dict[int, bytes] = {}
    for name, data in parts.items():
        if match := form.fullmatch(name):
            number = int(match[1] or 0)
            if number in numbered:
                raise SampleError(f"ambiguous image: several parts give image {number}")
            numbered[number] = data
    if sorted(numbered) != list(range(len(numbered))):
        raise SampleError(f"missing image: parts are numbered {sorted(numbered)}")
    return tuple(numbered[number] for number in range(len(numbered)))


def _meta(parts: Mapping[str, bytes]) -> dict[str, Any]:
    if "json" not in parts:
        return {}
    try:
        meta = json.loads(parts["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError("not JSON: the .json part") from error
    if not isinstance(meta, dict):
        raise SampleError("not JSON: the .json part is not an object")
    return meta


def _seed_turns(
    parts: Mapping[str, bytes], images: int, fields: FieldMap, instead: str
) -> tuple[Turn, ...]:
    """One question and one answer, found by the field map."""
    texts = []
    for name, options in (("question", fields.context), ("answer", fields.answers)):
        try:
            value = look_up(parts, options)
        except LookupError as error:
            if name == "question" and instead:
                texts.append(instead)
                continue
            raise SampleError(f"missing {name}: no {error}; there are {sorted(parts)}") from error
        except (ValueError, RecursionError) as error:
            raise SampleError(f"unreadable {name}: not UTF-8, or not JSON") from error
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, str):
            raise SampleError(f"not a text: the {name} is {_short(value)}")
        texts.append(value)
    question, answer = texts
    return (Turn("user", images_first(question, images)), Turn("assistant", answer))


def images_first(question: str, images: int) -> str:
    """The question with its images before it, unless it places them itself."""
    return question if PLACEHOLDER in question else f"{PLACEHOLDER}\n" * images + question


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."
