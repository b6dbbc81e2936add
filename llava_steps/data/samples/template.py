"""The chat template of a model: the text of a conversation or of a prompt, with refusals by name.

A template may expect a message's content as text or as a list of parts; which one is found out by
rendering a probe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from llava_steps.core.errors import ConfigError
from llava_steps.data.samples.sample import PLACEHOLDER, SampleError, Turn
from llava_steps.data.samples.template_text import (
    Form,
    native_form,
    refuse_changing,
    with_both_forms,
)

_PROBE = ("probe-question", "probe-answer")


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


@dataclass(frozen=True)
class Message:
    """One message as the template takes it."""

    role: str
    parts: tuple[str | None, ...]
    """Its texts; None stands for an image."""
    as_parts: bool
    """Whether the template takes its content as a list; otherwise there is exactly one text."""

    def entry(self) -> dict[str, Any]:
        """What transformers takes."""
        if not self.as_parts:
            return {"role": self.role, "content": self.parts[0]}
        content = [
            {"type": "image"} if text is None else {"type": "text", "text": text}
            for text in self.parts
        ]
        return {"role": self.role, "content": content}


class Template:
    """The chat template of a processor.

    Args:
        processor: LLaVA-like processor with tokenizer and chat template.
        text: Jinja text used instead of the processor's own template.

    Raises:
        ConfigError: no template, one that is not Jinja or whose prompts change from call to call,
            or one without a place for an image.
    """

    def __init__(self, processor: Any, text: str | None = None) -> None:
        self._processor = processor
        self.text = default_template(processor) if text is None else text
        refuse_changing(self.text)
        self.image_token: str = processor.image_token
        self._form: Form = native_form(self.text) or self._find_form()

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """The turns in the form that the template takes."""
        return [self._message(self._form, turn.role, turn.content) for turn in turns]

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The text of a conversation, one image token per image; with `prompt`, up to the answer.

        Raises:
            SampleError: the template refuses the conversation.
        """
        try:
            return self._apply([message.entry() for message in messages], prompt)
        except Exception as error:  # a template may fail in any way
            raise SampleError(f"the chat template refuses the conversation: {error}") from error

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text that asks for the answer that follows the turns, one image token per image.

        Raises:
            SampleError: the template refuses the turns, or leaves out what is asked.
        """
        messages = self.messages(turns)
        text = self.render(messages, prompt=True)
        self.check_images(turns, text)
        for number, message in enumerate(messages):
            # Of earlier answers a template may leave out the reasoning.
            if message.role != "assistant":
                check_written(message, number, text)
        return text

    def both_forms(self) -> str:
        """The template's text, with lines before it if it does not take contents in both forms."""
        if native_form(self.text) or self._takes_both():
            return self.text
        return with_both_forms(self.text, self._form, self.image_token)

    def _takes_both(self) -> bool:
        """Whether contents as parts and as text give the same conversation."""
        turns = [("user", f"{PLACEHOLDER}\n{_PROBE[0]}"), ("assistant", _PROBE[1])]
        texts = []
        for form in get_args(Form):
            messages = [self._message(form, role, content) for role, content in turns]
            try:
                texts.append(self._apply([message.entry() for message in messages]))
            except Exception:  # a template may fail in any way on another form
                return False
        return texts.count(texts[0]) == len(texts)

    def check_images(self, turns: Sequence[Turn], text: str) -> None:
        """SampleError unless the text has one image token for each placeholder of the turns."""
        images = sum(turn.content.count(PLACEHOLDER) for turn in turns)
        written = text.count(self.image_token)
        if written != images:
            raise SampleError(
                f"the chat template writes {written} image tokens for {images} images"
            )

    def _message(self, form: Form, role: str, content: str) -> Message:
        if form == "parts" or (form == "user parts" and role == "user"):
            parts = [part.get("text") for part in message_parts(content)]
            return Message(role, tuple(parts), as_parts=True)
        text = content.replace(PLACEHOLDER, self.image_token)
        return Message(role, (text,), as_parts=False)

    def _apply(self, entries: list[dict[str, Any]], prompt: bool = False) -> str:
        text: str = self._processor.apply_chat_template(
            entries, tokenize=False, add_generation_prompt=prompt, chat_template=self.text
        )
        return text

    def _find_form(self) -> Form:
        """Which contents the template takes as lists of parts, the form of HF's processors."""
        failure = ""
        forms: tuple[Form, ...] = ("parts", "user parts", "text")
        question, answer = f"{PLACEHOLDER}\n{_PROBE[0]}", _PROBE[1]
        for form in forms:
            messages = [
                self._message(form, "user", question),
                self._message(form, "assistant", answer),
            ]
            try:
                text = self._apply([message.entry() for message in messages])
            except Exception as error:  # a template may fail in any way on another form
                failure = f"; it fails with: {error}"
                continue
            if (
                text.count(self.image_token) == 1
                and all(text.count(probe) == 1 for probe in _PROBE)
                and "'type'" not in text
            ):
                return form
        raise ConfigError(
            "the chat template writes the image token neither for {'type': 'image'} parts nor for "
            f"{self.image_token!r} in a text{failure}; correct chat_template.jinja of the HF "
            "directory"
        )


def check_written(message: Message, number: int, text: str) -> None:
    """SampleError unless every text of message `number` is in `text`."""
    for part in message.parts:
        if part is not None and part.strip() not in text:
            raise SampleError(
                f"the chat template leaves out what the {message.role} says in turn {number}; use "
                f"one that writes it, or remove such turns"
            )


def control_pattern(processor: Any) -> re.Pattern[str]:
    """Matches the texts of all control tokens, which no content may hold."""
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special}
    special |= {*tokenizer.all_special_tokens, processor.image_token, PLACEHOLDER}
    return re.compile("|".join(re.escape(t) for t in sorted(special)))


def default_template(processor: Any) -> str:
    """The template that transformers uses when none is named."""
    template = processor.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ConfigError(
                f"the processor has several chat templates ({', '.join(sorted(template))}) but "
                "no default; keep the one to use as chat_template.jinja"
            )
        template = template["default"]
    if not template:
        raise ConfigError(
            "the processor has no chat template; write one into chat_template.jinja of the HF "
            "directory"
        )
    return str(template)
