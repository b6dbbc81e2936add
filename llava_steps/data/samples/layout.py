"""Where a chat template puts the texts of a conversation, found without rendering every prompt.

Rendering the prompts of all answers would take the square of the number of turns. Where a template
puts the texts depends on the kinds of messages and rarely on their words. So it is found out once
for each shape of conversation, with other words in it, and compared with the text of each one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_steps.data.samples.sample import SampleError
from llava_steps.data.samples.template import Message, Template, check_written

_WORD = re.compile(r"zq(\d+)qz")
_ALL = 8
"""Prompts that are all rendered; of more the first, the last, and one at each power of two."""
_SHAPES = 2048
"""Shapes that are remembered."""


@dataclass(frozen=True)
class Layout:
    """Where the template puts the texts of conversations of one shape."""

    order: tuple[int, ...]
    """Number of each text, in the order in which they are written."""
    literals: tuple[str, ...]
    """What the template writes before each of them, and after the last."""
    prompts: dict[int, int]
    """Turn of an answer: how much of the literal before it belongs to the prompt that asks for it.
    Answers are missing whose prompt is not the beginning of the text."""
    header: str | None = None
    """End of the last prompt, if it has another text than the literal before the last answer."""

    def fit(self, texts: Sequence[str], text: str) -> list[tuple[int, int]] | None:
        """[start, end) of each text, in the order of the layout; None if it is not the text's."""
        bounds, at = [], 0
        for position, number in enumerate(self.order):
            at += len(self.literals[position])
            following = self.literals[position + 1]
            if not text.startswith(self.literals[position], at - len(self.literals[position])):
                return None
            raw = texts[number]
            for form in dict.fromkeys((raw, raw.rstrip(), raw.lstrip(), raw.strip())):
                if text.startswith(form, at) and text.startswith(following, at + len(form)):
                    break
            else:
                return None
            bounds.append((at, at + len(form)))
            at += len(form)
        return bounds if at + len(self.literals[-1]) == len(text) else None


class Layouts:
    """The layouts of a template, by the shape of the conversation."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._layouts: dict[tuple[Any, ...], Layout | None] = {}

    def of(self, messages: Sequence[Message]) -> Layout | None:
        """The layout of a conversation of this shape; None if the template goes by the words.

        Raises:
            SampleError: the template refuses it, or leaves out a text.
        """
        shape = tuple(
            (m.role, m.as_parts, tuple(part is None for part in m.parts)) for m in messages
        )
        if shape not in self._layouts:
            if len(self._layouts) == _SHAPES:
                self._layouts.clear()
            self._layouts[shape] = self._make(messages)
        return self._layouts[shape]

    def _make(self, messages: Sequence[Message]) -> Layout | None:
        probe, number = [], 0
        for message in messages:
            parts = []
            for part in message.parts:
                parts.append(None if part is None else f"zq{number}qz")
                number += part is not None
            probe.append(Message(message.role, tuple(parts), message.as_parts))
        whole = self._template.render(probe)
        for turn, message in enumerate(probe):
            check_written(message, turn, whole)
        order = tuple(int(match[1]) for match in _WORD.finditer(whole))
        if len(order) != number:
            return None
        literals, at = [], 0
        before = {}
        owners = owners_of(probe)
        for match in _WORD.finditer(whole):
            literals.append(whole[at : match.start()])
            before[owners[int(match[1])]] = (at, match.start())
            at = match.end()
        prompts = self._prompts(probe, whole, before)
        header, last = None, len(probe) - 1
        if last not in prompts and order and owners[order[-1]] == last:
            header = self._header(probe[:-1], whole, before[last][0])
        if header is not None:
            prompts[last] = len(header)
        return Layout(order, (*literals, whole[at:]), prompts, header)

    def _header(self, messages: Sequence[Message], whole: str, at: int) -> str | None:
        """End of the prompt after `at`, up to which it must be the beginning of `whole`."""
        prompt = prompt_of(self._template, messages)
        return prompt[at:] if prompt is not None and prompt[:at] == whole[:at] else None

    def _prompts(
        self, probe: Sequence[Message], whole: str, before: dict[int, tuple[int, int]]
    ) -> dict[int, int]:
        """`Layout.prompts`; `before` has start and end of the literal before each turn's text."""
        turns = [n for n, message in enumerate(probe) if message.role == "assistant"]
        lengths: dict[int, int | None] = {}
        known: dict[str, int | None] = {}
        rendered = _chosen(turns)
        for turn in [*rendered, *(turn for turn in turns if turn not in rendered)]:
            start, end = before[turn]
            literal = whole[start:end]
            if turn in rendered or literal not in known:
                prompt = prompt_of(self._template, probe[:turn])
                fits = prompt is not None and whole.startswith(prompt)
                length = len(prompt) - start if prompt is not None and fits else None
                if length is not None and not 0 <= length <= end - start:
                    length = None
                lengths[turn] = length
                if turn != turns[-1]:
                    known.setdefault(literal, length)
            else:
                lengths[turn] = known[literal]
        return {turn: length for turn, length in lengths.items() if length is not None}


def owners_of(messages: Sequence[Message]) -> list[int]:
    """The message of each text."""
    return [n for n, message in enumerate(messages) for part in message.parts if part is not None]


def prompt_of(template: Template, messages: Sequence[Message]) -> str | None:
    """The prompt that follows the messages; None if the template refuses it."""
    try:
        return template.render(messages, prompt=True)
    except SampleError:
        return None


def _chosen(turns: Sequence[int]) -> list[int]:
    """The answers whose prompts are rendered: their lengths add up to a multiple of the whole."""
    count = len(turns)
    if count <= _ALL:
        return list(turns)
    numbers = {0, 1, 2, 3, count - 2, count - 1}
    number = _ALL
    while number < count:
        numbers.add(number)
        number *= 2
    return [turns[number] for number in sorted(numbers)]
