"""Conversations to token ids and labels, with what is saved in the HF directory.

The ids are those of `processor.apply_chat_template(messages, tokenize=True)` with the images: the
template's text, each image token repeated as often as the image has features. Labels are the
answers and their end tokens, already shifted by one position.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llava_steps.core.errors import ConfigError
from llava_steps.data.samples.encoded import IGNORED, Encoded
from llava_steps.data.samples.images import ImageTransform
from llava_steps.data.samples.processor import load_processor
from llava_steps.data.samples.sample import SampleError, Turn
from llava_steps.data.samples.template import Template
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
        if not tokenizer.is_fast:
            raise ConfigError(f"{hf_dir}: a fast tokenizer (tokenizer.json) is needed for labels")
        self.seq_length = seq_length
        self._truncate = truncate
        self.images = ImageTransform(processor.image_processor)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(processor.image_token)
        self.tokens_per_image = _tokens_per_image(processor, self.images)
        self.pad_id = _pad_id(tokenizer, self.image_token_id, hf_dir)
        self.end_ids = _end_ids(hf_dir, tokenizer)
        ends = [tokenizer.convert_ids_to_tokens(i) for i in self.end_ids]
        self._template = _template(processor, ends, chat_template or hf_dir)
        self._bos: str | None = tokenizer.bos_token
        self._backend = _exact_offsets(tokenizer)

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """Ids and labels of a checked conversation.

        Raises:
            SampleError: longer than seq_length and not to be cut, or not so that an answer and its
                images stay; nothing supervised, an image token inside an answer, a token across
                the border of an answer, or what `Template.render` refuses.
        """
        rendered = self._template.render(turns)
        encoding = self._tokenize(rendered.text)
        ids = np.array(encoding.ids, dtype=np.int64)
        inside = _inside(encoding.offsets, rendered.spans, rendered.text)
        is_image = ids == self.image_token_id
        if (inside & is_image).any():
            raise SampleError("an answer contains an image token")
        repeats = np.where(is_image, self.tokens_per_image, 1)
        kept = len(ids)
        if cut := self._too_long(int(repeats.sum())):
            kept = _fitting(np.cumsum(repeats), inside, is_image, self.seq_length)
        tokens = np.repeat(ids[:kept], repeats[:kept])
        targets = np.where(np.repeat(inside[:kept], repeats[:kept]), tokens, IGNORED)
        shifted = np.full_like(targets, IGNORED)
        shifted[:-1] = targets[1:]
        if not (shifted != IGNORED).any():
            raise SampleError("no token is supervised")
        return Encoded(
            torch.from_numpy(tokens),
            torch.from_numpy(shifted),
            images=int(is_image[:kept].sum()),
            answers=int((_ends(inside) < kept).sum()),
            cut=cut,
        )

    def length(self, turns: Sequence[Turn]) -> int:
        """Number of tokens that `encode` gives, image tokens included.

        Raises:
            SampleError: longer than seq_length and not to be cut, or no text for it.
        """
        ids: list[int] = self._tokenize(self._template.text(turns)).ids
        length = len(ids) + ids.count(self.image_token_id) * (self.tokens_per_image - 1)
        return len(self.encode(turns).tokens) if self._too_long(length) else length

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.int64]) -> str:
        """The text of some tokens, special ones included."""
        text: str = self._backend.decode([int(t) for t in tokens], skip_special_tokens=False)
        return text

    def _tokenize(self, text: str) -> Any:
        # The tokenizer adds its special tokens unless the template wrote them, as HF does it.
        template_has_bos = self._bos is not None and text.startswith(self._bos)
        return self._backend.encode(text, add_special_tokens=not template_has_bos)

    def _too_long(self, length: int) -> bool:
        """Whether to cut; SampleError if a longer conversation is not to be cut."""
        if length > self.seq_length and not self._truncate:
            raise SampleError(
                f"{length} tokens are more than seq_length {self.seq_length}; raise seq_length, "
                "set too_long to truncate, or remove the sample"
            )
        return length > self.seq_length


def _template(processor: Any, ends: Sequence[str], where: Path) -> Template:
    """The processor's template, or the one in the file `where`."""
    try:
        text = where.read_text(encoding="utf-8") if where.is_file() else None
        return Template(processor, ends, text)
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _inside(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], text: str
) -> npt.NDArray[np.bool_]:
    """bool [len(offsets)]: the token lies in one of the spans.

    Raises:
        SampleError: a token lies across a border, so that prompt and answer share it.
    """
    mask = np.zeros(len(offsets), dtype=bool)
    starts = np.array([start for start, _ in offsets])
    ends = np.array([end for _, end in offsets])
    real = ends > starts
    for start, end in spans:
        for border in (start, end):
            across = real & (starts < border) & (ends > border)
            if across.any():
                a, b = offsets[int(np.argmax(across))]
                raise SampleError(
                    f"the token {text[a:b]!r} crosses the border of an answer; the chat "
                    "template must not end its generation prompt inside a token"
                )
        mask |= real & (starts >= start) & (ends <= end)
    return mask


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


def _end_ids(hf_dir: Path, tokenizer: Any) -> list[int]:
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
