"""Conversations to token ids and labels, with what is saved in the HF directory.

The ids are those of `processor.apply_chat_template(messages, tokenize=True)` with the images: the
template's text, each image token repeated as often as the image has features. Labels are the
answers and their end tokens, already shifted by one position.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llava_steps.core.errors import ConfigError
from llava_steps.data.samples.answers import Answers, Span
from llava_steps.data.samples.encoded import IGNORED, Encoded
from llava_steps.data.samples.images import ImageTransform
from llava_steps.data.samples.processor import load_processor
from llava_steps.data.samples.prompt import Prompts, Tokens
from llava_steps.data.samples.sample import SampleError, Turn
from llava_steps.geometry.hf_directory import read_object


class ConversationEncoder:
    """Tokenizes conversations for one HF directory.

    Args:
        hf_dir: directory with tokenizer, processor and chat template.
        seq_length: longest accepted conversation in tokens, image tokens included.
        chat_template: Jinja file used instead of the directory's own template.
        truncate: cut longer conversations after the last answer that fits, end token included; if
            not even the first does, inside it.

    Raises:
        InputError, ConfigError: nothing can be trained with this directory; the message says why.
    """

    def __init__(
        self,
        hf_dir: Path,
        seq_length: int,
        chat_template: Path | None = None,
        truncate: bool = False,
    ) -> None:
        processor = load_processor(hf_dir)
        tokenizer = processor.tokenizer
        self.seq_length = seq_length
        self._truncate = truncate
        self.images = ImageTransform(processor.image_processor)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(processor.image_token)
        self.tokens_per_image = _tokens_per_image(processor, self.images)
        self.pad_id = _pad_id(tokenizer, self.image_token_id, hf_dir)
        self.end_ids = end_ids(hf_dir, tokenizer)
        ends = [tokenizer.convert_ids_to_tokens(i) for i in self.end_ids]
        try:
            self.prompts = Prompts(processor, chat_template)
            self._answers = Answers(self.prompts.template, processor, ends)
        except ConfigError as error:
            raise ConfigError(f"{chat_template or hf_dir}: {error}") from error

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """Ids and labels of a checked conversation.

        Raises:
            SampleError: longer than seq_length and not to be cut, or not so that an answer and its
                images stay; nothing supervised, a token across the border of an answer, or what
                `Answers.render` and `Prompts.check_borders` refuse.
        """
        rendered = self._answers.render(turns)
        tokens = self.prompts.tokenize(rendered.text)
        inside = _inside(tokens, rendered.spans, rendered.text)
        self.prompts.check_borders(rendered.text, tokens, [span.start for span in rendered.spans])
        is_image = tokens.ids == self.image_token_id
        if (inside & is_image).any():
            raise SampleError("an answer contains an image token")
        repeats = np.where(is_image, self.tokens_per_image, 1)
        kept = len(tokens.ids)
        if cut := self._too_long(int(repeats.sum())):
            kept = _fitting(np.cumsum(repeats), inside, is_image, self.seq_length)
        ids = np.repeat(tokens.ids[:kept], repeats[:kept])
        targets = np.where(np.repeat(inside[:kept], repeats[:kept]), ids, IGNORED)
        shifted = np.full_like(targets, IGNORED)
        shifted[:-1] = targets[1:]
        if not (shifted != IGNORED).any():
            raise SampleError("no token is supervised")
        whole = int((_ends(inside) < kept).sum())
        return Encoded(
            torch.from_numpy(ids),
            torch.from_numpy(shifted),
            images=int(is_image[:kept].sum()),
            answers=whole,
            open_answers=sum(not span.ended for span in rendered.spans[:whole]),
            context_answers=len(turns) // 2 - len(rendered.spans),
            cut=cut,
        )

    def length(self, turns: Sequence[Turn]) -> int:
        """Number of tokens that `encode` gives, image tokens included.

        Raises:
            SampleError: longer than seq_length and not to be cut, or no text for it.
        """
        ids = self.prompts.tokenize(self._answers.render(turns).text).ids
        images = int((ids == self.image_token_id).sum())
        length = len(ids) + images * (self.tokens_per_image - 1)
        return len(self.encode(turns).tokens) if self._too_long(length) else length

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.int64]) -> str:
        """The text of some tokens, special ones included."""
        return self.prompts.decode(tokens)

    def _too_long(self, length: int) -> bool:
        """Whether to cut; SampleError if a longer conversation is not to be cut."""
        if length > self.seq_length and not self._truncate:
            raise SampleError(
                f"{length} tokens are more than seq_length {self.seq_length}; raise seq_length, "
                "set too_long to truncate, or remove the sample"
            )
        return length > self.seq_length


def _inside(tokens: Tokens, spans: Sequence[Span], text: str) -> npt.NDArray[np.bool_]:
    """bool [tokens]: the token lies in one of the spans.

    Raises:
        SampleError: a token lies across a border, so that prompt and answer share it.
    """
    borders = np.array([(span.start, span.end) for span in spans], np.int64).reshape(-1)
    real = tokens.ends > tokens.starts
    passed = np.searchsorted(borders, tokens.starts, side="right")
    across = real & (np.searchsorted(borders, tokens.ends, side="left") > passed)
    if across.any():
        number = int(np.argmax(across))
        shared = text[tokens.starts[number] : tokens.ends[number]]
        raise SampleError(
            f"the token {shared!r} crosses the border of an answer; the chat template must "
            "not end its generation prompt inside a token"
        )
    inside: npt.NDArray[np.bool_] = real & (passed % 2 == 1)
    return inside


def _ends(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The last position of each answer."""
    return np.flatnonzero(inside & ~np.append(inside[1:], False))


def _fitting(
    lengths: npt.NDArray[np.int64],
    inside: npt.NDArray[np.bool_],
    is_image: npt.NDArray[np.bool_],
    limit: int,
) -> int:
    """How many ids of a conversation stay when `limit` tokens may.

    Args:
        lengths: tokens up to each id and with it, images expanded.
        inside: which ids belong to answers.
        is_image: which ids stand for an image.
        limit: seq_length.

    Raises:
        SampleError: the first answer, or an image of its question, would not be there at all.
    """
    ends = _ends(inside)
    whole = ends[lengths[ends] <= limit]
    if len(whole):
        return int(whole[-1]) + 1
    kept = int(np.searchsorted(lengths, limit, side="right"))
    first = ends[0] + 1 if len(ends) else len(lengths)
    if is_image[kept:first].any() or not inside[:kept].any():
        raise SampleError(
            f"of its {lengths[-1]} tokens the first {limit} (seq_length) hold no part of an answer "
            "with all its images; raise seq_length or remove the sample"
        )
    return kept


def _tokens_per_image(processor: Any, images: ImageTransform) -> int:
    """Image tokens that the processor writes for one image."""
    shape = np.broadcast_to(np.float32(0), (1, 3, images.height, images.width))
    text: str = processor.replace_image_token({"pixel_values": shape}, image_idx=0)
    count, rest = divmod(len(text), len(processor.image_token))
    if rest or count < 1:
        raise ConfigError(
            "the processor gives no image tokens for an image; check patch_size and "
            "vision_feature_select_strategy in processor_config.json"
        )
    return count


def _pad_id(tokenizer: Any, image_token_id: int, hf_dir: Path) -> int:
    """Id that fills up rows; it is never supervised, but must not be taken for an image."""
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    if pad is None or pad == image_token_id:
        raise ConfigError(f"{hf_dir}: the tokenizer needs a pad_token that is not the image token")
    return int(pad)


def end_ids(hf_dir: Path, tokenizer: Any) -> list[int]:
    """Ids that end a generation: those of generation_config.json, or else the eos token."""
    ids: Any = None
    path = hf_dir / "generation_config.json"
    if path.is_file():
        ids = read_object(path).get("eos_token_id")
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list) else [int(ids)]
