"""The token ids of prompts and conversations: one place for training, evaluation and chat.

They are those of `processor.apply_chat_template(messages, tokenize=True)`: the template's text, and
before it what the tokenizer puts before every text, unless the text begins with the beginning token
already. What a tokenizer puts after every text is left out: a prompt is not at an end. build_hf and
megatron_to_hf save tokenizers that put nothing there, so that transformers agrees.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llava_steps.core.errors import ConfigError
from llava_steps.data.samples.sample import SampleError, Turn
from llava_steps.data.samples.template import Template

_WINDOWS = 10_000
"""Ends of prompts whose ids are remembered."""


class Tokens(NamedTuple):
    """A text in tokens."""

    ids: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    """[starts, ends) of each in characters; equal where a token stands for no character."""


class Prompts:
    """Makes the prompts of one HF directory.

    Args:
        processor: its processor, with a fast tokenizer.
        template: Jinja file used instead of the directory's own template.

    Raises:
        ConfigError: a tokenizer or template that cannot be used.
    """

    def __init__(self, processor: Any, template: Path | None = None) -> None:
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise ConfigError("a fast tokenizer (tokenizer.json) is needed")
        self.template = Template(processor, None if template is None else _read(template))
        self._bos: str | None = tokenizer.bos_token
        self._backend = _exact_offsets(tokenizer)
        self._before = added_around(self._backend)[0]
        self._special = {
            number: str(token)
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and not token.normalized
        }
        self._is_special = np.zeros(1 + max([len(tokenizer), *self._special]), dtype=bool)
        self._is_special[list(self._special)] = True
        self._windows: dict[str, list[int]] = {}

    def ids(self, turns: Sequence[Turn]) -> list[int]:
        """Ids that ask for the answer that follows the turns; one image token per image.

        Raises:
            SampleError: the template refuses the turns, or leaves out what is asked.
        """
        ids: list[int] = self.tokenize(self.template.prompt(turns)).ids.tolist()
        return ids

    def tokenize(self, text: str) -> Tokens:
        """The tokens of what the template wrote."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        begun = self._bos is not None and text.startswith(self._bos)
        before = [] if begun else self._before
        offsets = np.array([(0, 0)] * len(before) + encoding.offsets, np.int64).reshape(-1, 2)
        return Tokens(np.array(before + encoding.ids, np.int64), offsets[:, 0], offsets[:, 1])

    def check_borders(self, text: str, tokens: Tokens, starts: Sequence[int]) -> None:
        """SampleError unless the prompts that end at `starts` have the ids that `tokens` has there.

        A token that reaches over the border is not looked for. What is read before a special token
        does not depend on what follows it, so only the text since the last one is compared.
        """
        special = np.array(
            [
                at
                for at in np.flatnonzero(self._is_special[tokens.ids]).tolist()
                # The unknown token also stands for text.
                if text[tokens.starts[at] : tokens.ends[at]] == self._special[int(tokens.ids[at])]
            ]
        )
        for start in starts:
            border = int(np.searchsorted(tokens.starts, start))
            earlier = int(np.searchsorted(special, border)) - 1
            first = int(special[earlier]) if earlier >= 0 else 0
            begin = int(tokens.starts[first])
            whole = self.tokenize(text[:start]).ids if not begin else None
            window = self._window(text[begin:start]) if whole is None else whole[first:].tolist()
            if window != tokens.ids[first:border].tolist():
                raise SampleError(
                    f"the tokenizer reads the end of the prompt {text[begin:start][-20:]!r} "
                    "differently when an answer follows; end the generation prompt of the chat "
                    "template with a control token"
                )

    def lead(self) -> list[int]:
        """Ids that the template writes between a prompt and its answer, such as a think block.

        A model trained on the template writes them too. White space is left out.
        """
        question, answer = (Turn("user", "probe-question"), Turn("assistant", "probe-answer"))
        try:
            prompt = self.template.prompt([question])
            whole = self.template.render(self.template.messages([question, answer]))
        except SampleError:
            return []
        end = whole.find(answer.content, len(prompt))
        if not whole.startswith(prompt) or not whole[len(prompt) : end].strip():
            return []
        tokens = self.tokenize(whole)
        inside = (tokens.starts >= len(prompt)) & (tokens.ends <= end)
        ids: list[int] = tokens.ids[inside & (tokens.ends > tokens.starts)].tolist()
        return ids

    def _window(self, text: str) -> list[int]:
        if text not in self._windows:
            if len(self._windows) == _WINDOWS:
                self._windows.clear()
            self._windows[text] = self._backend.encode(text, add_special_tokens=False).ids
        return self._windows[text]

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.int64]) -> str:
        """The text of some tokens, special ones included."""
        text: str = self._backend.decode([int(t) for t in tokens], skip_special_tokens=False)
        return text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(error)) from error


def _exact_offsets(tokenizer: Any) -> Any:
    """The tokenizer's backend with offsets that cover every character, leading spaces too."""
    from tokenizers import Tokenizer

    def untrim(value: Any) -> Any:
        if isinstance(value, list):
            return [untrim(item) for item in value]
        if isinstance(value, dict):
            return {k: False if k == "trim_offsets" else untrim(v) for k, v in value.items()}
        return value

    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("post_processor", "pre_tokenizer"):
        description[part] = untrim(description[part])
    backend = Tokenizer.from_str(json.dumps(description))
    backend.no_truncation()
    backend.no_padding()
    return backend


def added_around(backend: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text.

    Raises:
        ConfigError: it changes the text itself.
    """
    plain: list[int] = backend.encode("a", add_special_tokens=False).ids
    full: list[int] = backend.encode("a").ids
    for count in range(len(full) - len(plain) + 1):
        if full[count : count + len(plain)] == plain:
            return full[:count], full[count + len(plain) :]
    raise ConfigError("the tokenizer changes a text when it adds special tokens to it")
