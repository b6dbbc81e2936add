"""Where the answers are in the text of a conversation, and which of them are to be learned.

The text is the template's rendering of the whole conversation. An answer is supervised from the end
of the prompt that asks for it up to its end token, with all that the template writes in between
(such as an empty think block), if the text before it is the prompt that asks for it and the answer
is there whole. The last answer must be so. If the prompt for it only begins the answer in other
words than the rendering (`assistant` and a line break, and with a space between them), it is put in
place of them. An earlier answer that is not so is context only; one without an end token, since the
template ends only the last answer, is supervised without it.

layout.py finds the texts. If the layout does not fit, as with a template that moves the
reasoning in an answer, the prompts of that conversation are rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_steps.core.errors import ConfigError
from llava_steps.data.samples.layout import Layouts, owners_of, prompt_of
from llava_steps.data.samples.sample import PLACEHOLDER, SampleError, Turn
from llava_steps.data.samples.template import Message, Template, check_written, control_pattern

_PROBE = ("probe-question", "probe-answer", "probe-again", "probe-end")


class Span(NamedTuple):
    """[start, end) of a supervised answer in characters."""

    start: int
    end: int
    ended: bool
    """Whether it holds an end token, which is then its last token."""


@dataclass(frozen=True)
class Rendered:
    """Text of a conversation, one image token per image, and its supervised spans."""

    text: str
    spans: tuple[Span, ...]
    """The supervised answers in order."""


class Answers:
    """Finds the answers in what a template writes.

    Args:
        template: the template.
        processor: its processor.
        end_tokens: texts of the tokens that end a generation.

    Raises:
        ConfigError: no conversation can be trained on with this template.
    """

    def __init__(self, template: Template, processor: Any, end_tokens: Sequence[str]) -> None:
        self._template = template
        self._ends = sorted(end_tokens, key=len, reverse=True)
        if not self._ends:
            raise ConfigError("the tokenizer has no eos_token; answers need an end token")
        self._tokenizer = processor.tokenizer
        self._control = control_pattern(processor)
        self._layouts = Layouts(template)
        self._check()

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Text and supervised spans of a checked conversation.

        Raises:
            SampleError: the text contains a control token of the tokenizer, or the template does
                something to this conversation that hides where its answers are.
        """
        messages, text = self._whole(turns)
        return self._by_layout(messages, text) or self._by_prompts(messages, text)

    def _whole(self, turns: Sequence[Turn]) -> tuple[list[Message], str]:
        for number, turn in enumerate(turns):
            for piece in turn.content.split(PLACEHOLDER):
                if match := self._control.search(piece):
                    raise SampleError(f"control token {match[0]!r} in the text of turn {number}")
            if turn.role == "assistant" and PLACEHOLDER in turn.content:
                raise SampleError(f"an answer contains an image token: turn {number}")
        messages = self._template.messages(turns)
        text = self._template.render(messages)
        self._template.check_images(turns, text)
        return messages, text

    def _by_layout(self, messages: list[Message], text: str) -> Rendered | None:
        """None if the layout of the shape does not fit the text."""
        layout = self._layouts.of(messages)
        if layout is None:
            return None
        texts = [part for message in messages for part in message.parts if part is not None]
        bounds = layout.fit(texts, text)
        if bounds is None:
            return None
        owners = owners_of(messages)
        last, spans = len(messages) - 1, []
        for position, number in enumerate(layout.order):
            turn = owners[number]
            if messages[turn].role != "assistant":
                continue
            if turn not in layout.prompts:
                if turn == last:
                    raise _changed(turn)
                continue
            before, after = layout.literals[position], layout.literals[position + 1]
            start, end = bounds[position]
            begin = start - len(before)
            if turn == last and layout.header is not None:
                text = text[:begin] + layout.header + text[start:]
                end += len(layout.header) - len(before)
            stop = self._end(after, turn, last)
            spans.append(Span(begin + layout.prompts[turn], end + stop, ended=stop > 0))
        return Rendered(text, tuple(spans))

    def _end(self, rest: str, turn: int, last: int) -> int:
        """Characters of `rest`, which follows an answer, up to the end of its end token."""
        gap = len(rest) - len(rest.lstrip())
        end = next((token for token in self._ends if rest.startswith(token, gap)), None)
        if end is not None:
            return gap + len(end)
        if turn != last:
            return 0
        raise SampleError(
            f"the chat template writes none of the end tokens {self._ends} after the answer of "
            f"turn {turn}, but {rest[:20]!r}; {self._remedy(rest[gap:])}"
        )

    def _remedy(self, rest: str) -> str:
        match = self._control.match(rest)
        if match is None or match[0] == self._template.image_token:
            return (
                "give a chat template that writes one of them after each answer "
                "(hf_model.chat_template)"
            )
        number = self._tokenizer.convert_tokens_to_ids(match[0])
        return (
            f"set eos_token_id in generation_config.json of the language model to {number}, the id "
            f"of {match[0]!r}"
        )

    def _by_prompts(self, messages: list[Message], text: str) -> Rendered:
        """A conversation whose words change what the template writes.

        The prompts of all answers are rendered; an answer lasts up to the first end token.
        """
        for number, message in enumerate(messages):
            if message.role != "assistant":
                check_written(message, number, text)
        last, spans = len(messages) - 1, []
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = prompt_of(self._template, messages[:turn])
            if prompt is None or not text.startswith(prompt):
                if turn == last:
                    raise _changed(turn)
                continue
            start = len(prompt)
            ends = [(text.find(token, start), token) for token in self._ends]
            stops = [(at, token) for at, token in ends if at >= 0]
            stop, token = min(stops, default=(len(text), ""))
            answer = "".join(part for part in message.parts if part is not None)
            if not _squeezed(text[start:stop]).endswith(_squeezed(answer)):
                if turn == last:
                    raise SampleError(
                        f"the chat template does not write the answer of turn {turn} whole after "
                        "its generation prompt"
                    )
                continue
            if not token:
                self._end(text[start:].rstrip()[-20:], turn, last)
            spans.append(Span(start, stop + len(token), ended=bool(token)))
        return Rendered(text, tuple(spans))

    def _check(self) -> None:
        """Render conversations of two rounds and of one; if both fail, so does every sample."""
        failure = None
        for roles in (("user", "assistant", "user", "assistant"), ("user", "assistant")):
            turns = [Turn(role, text) for role, text in zip(roles, _PROBE, strict=False)]
            try:
                self.render(turns)
                return
            except SampleError as error:
                failure = failure or error
        raise ConfigError(f"the chat template: {failure}") from failure


def _changed(turn: int) -> SampleError:
    return SampleError(
        f"the chat template changes what it wrote before turn {turn}: answers cannot be separated "
        "from prompts"
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())
