"""A conversation as the text that the saved chat template makes of it, with the answers marked.

A template may expect a message's content as text or as a list of parts; which one is found out by
rendering a probe. Where an answer begins and ends is found by rendering the messages before it and
up to it: the template must only ever append, so that each rendering is a prefix of the next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_steps.core.errors import ConfigError
from llava_steps.data.samples.sample import PLACEHOLDER, SampleError, Turn

_PROBE = ("probe-question", "probe-answer", "probe-again", "probe-end")


@dataclass(frozen=True)
class Rendered:
    """Text of a conversation, one image token per image, and its supervised spans."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """[start, end) of each answer in characters, its end token included."""


def message_parts(content: str) -> list[dict[str, str]]:
    """A content with `<image>` placeholders as the list of parts that HF templates take.

    A line break beside a placeholder belongs to the placeholder: templates write their own.
    """
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
            text = text.removeprefix("\n")
        if number < content.count(PLACEHOLDER):
            text = text.removesuffix("\n")
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def takes_parts(processor: Any, template: str | None = None) -> bool:
    """Whether a chat template takes lists of parts, the form of HF's processors, or only texts.

    Args:
        processor: LLaVA-like processor with tokenizer and chat template.
        template: Jinja text used instead of the processor's own template.

    Raises:
        ConfigError: it writes the image token for neither.
    """
    own = {} if template is None else {"chat_template": template}
    image, probe = processor.image_token, _PROBE[0]
    parts = [{"type": "image"}, {"type": "text", "text": probe}]
    forms: dict[bool, Any] = {True: parts, False: f"{image}\n{probe}"}
    for as_parts, content in forms.items():
        try:
            text: str = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, **own
            )
        except Exception:  # noqa: S112  a template may fail in any way on the other form
            continue
        if text.count(image) == 1 and probe in text and "'type'" not in text:
            return as_parts
    where = processor.tokenizer.name_or_path if template is None else "a blend"
    raise ConfigError(
        f"the chat template of {where} writes the image token neither for {{'type': 'image'}} "
        f"parts nor for {image!r} in a text; correct it"
    )


class Template:
    """The chat template of a processor.

    Args:
        processor: LLaVA-like processor with tokenizer and chat template.
        end_tokens: texts of the tokens that end a generation.
        text: Jinja text used instead of the processor's own template.

    Raises:
        ConfigError: no template, or one that supervision cannot be derived from.
    """

    def __init__(self, processor: Any, end_tokens: Sequence[str], text: str | None = None) -> None:
        self._processor = processor
        self._own = {} if text is None else {"chat_template": text}
        self.image_token: str = processor.image_token
        self._ends = sorted(end_tokens, key=len, reverse=True)
        if not self._ends:
            raise ConfigError("the tokenizer has no eos_token; answers need an end token")
        added = processor.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        special |= {*processor.tokenizer.all_special_tokens, self.image_token, PLACEHOLDER}
        self._control = re.compile("|".join(re.escape(t) for t in sorted(special)))
        self._as_parts = takes_parts(processor, text)
        self._check()

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Text and supervised spans of a checked conversation.

        Raises:
            SampleError: the text contains a control token of the tokenizer, or the template does
                something to this conversation that hides where its answers are.
        """
        messages, text = self._whole(turns)
        return Rendered(text, tuple(self._spans(turns, messages, text)))

    def text(self, turns: Sequence[Turn]) -> str:
        """Only the text of `render`, which is quicker.

        Raises:
            SampleError: as `render`, but for what concerns answers.
        """
        return self._whole(turns)[1]

    def _whole(self, turns: Sequence[Turn]) -> tuple[list[dict[str, Any]], str]:
        for number, turn in enumerate(turns):
            for piece in turn.content.split(PLACEHOLDER):
                if match := self._control.search(piece):
                    raise SampleError(f"control token {match[0]!r} in the text of turn {number}")
        messages = [self._message(turn) for turn in turns]
        text = self._apply(messages)
        images = sum(turn.content.count(PLACEHOLDER) for turn in turns)
        if text.count(self.image_token) != images:
            raise SampleError(
                f"the chat template writes {text.count(self.image_token)} image tokens for "
                f"{images} images"
            )
        return messages, text

    def _spans(
        self, turns: Sequence[Turn], messages: list[dict[str, Any]], text: str
    ) -> list[tuple[int, int]]:
        spans = []
        for number in range(1, len(turns), 2):
            before = self._apply(messages[:number], prompt=True)
            after = text if number + 1 == len(turns) else self._apply(messages[: number + 1])
            if not after.startswith(before) or not text.startswith(after):
                raise SampleError(
                    f"the chat template changes what it wrote before turn {number}: "
                    "answers cannot be separated from prompts"
                )
            answer = turns[number].content.strip()
            start = len(before)
            body = start + len(after[start:]) - len(after[start:].lstrip())
            if not after.startswith(answer, body):
                raise SampleError(
                    f"the chat template does not write the answer of turn {number} right after "
                    "its generation prompt"
                )
            rest = after[body + len(answer) :]
            gap = len(rest) - len(rest.lstrip())
            end = next((t for t in self._ends if rest.startswith(t, gap)), None)
            if end is None:
                raise SampleError(
                    f"the chat template writes none of the end tokens {self._ends} after the "
                    f"answer of turn {number}, but {rest[:20]!r}"
                )
            spans.append((start, body + len(answer) + gap + len(end)))
        return spans

    def _apply(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        text: str = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, **self._own
        )
        return text

    def _message(self, turn: Turn) -> dict[str, Any]:
        if self._as_parts:
            return {"role": turn.role, "content": message_parts(turn.content)}
        return {
            "role": turn.role,
            "content": turn.content.replace(PLACEHOLDER, self.image_token),
        }

    def _check(self) -> None:
        """Render a conversation of two rounds; what fails here fails for every sample."""
        roles = ("user", "assistant", "user", "assistant")
        turns = [Turn(role, text) for role, text in zip(roles, _PROBE, strict=True)]
        try:
            self.render(turns)
        except SampleError as error:
            raise ConfigError(f"the chat template: {error}") from error
