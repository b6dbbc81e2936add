"""Questions, answered by a Hugging Face directory with plain transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.generation.streamers import BaseStreamer

from llava_steps.conversion.weight_files import check_weight_files
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.core.third_party import reported
from llava_steps.data.samples.images import ImageReader
from llava_steps.data.samples.processor import load_processor
from llava_steps.data.samples.prompt import Prompts
from llava_steps.data.samples.sample import SampleError, Turn
from llava_steps.geometry.hf_directory import read_config

TINY = 10_000_000
"""Parameters below which a second CPU thread costs more than it gains, above all on busy cores."""


@dataclass(frozen=True)
class Question:
    """The last question of a conversation, with what was said before it."""

    id: str
    group: str
    """Kind and language, as "what_digit/en"; "questions" when the file has neither."""
    turns: tuple[dict[str, str], ...]
    """role and content, from the first turn to the question."""
    images: tuple[bytes, ...]
    reference: str
    answers: tuple[str, ...] = ()
    """Answers of several people, if the file has them."""

    @property
    def references(self) -> tuple[str, ...]:
        """All accepted answers; at least one."""
        return self.answers or (self.reference,)


@dataclass(frozen=True)
class Reply:
    """What a model answered."""

    text: str
    is_cut: bool
    """Whether it ended at the largest number of tokens, without an end token."""


def check_llava(directory: Path) -> None:
    """InputError unless config.json is that of a LLaVA; ConfigError if it is quantized.

    Checked first: transformers would continue with LLaVA-1.5, 7 billion random weights.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory} is not a complete LLaVA model: config.json is missing")
    config = read_config(directory)
    kind = config.get("model_type")
    if kind != "llava":
        raise InputError(f"{directory} is not a complete LLaVA model: its model_type is {kind!r}")
    for part in ("vision_config", "text_config"):
        if not isinstance(config.get(part), dict):
            raise InputError(f"{directory} is not a complete LLaVA model: {path} has no {part}")


class Model:
    """A Hugging Face LLaVA directory, on the GPU if there is one."""

    def __init__(self, directory: Path) -> None:
        """Load processor and model, both from disk only.

        Raises:
            InputError: the directory is not a whole LLaVA model with its processor.
            ConfigError: its chat template cannot be used, as in training.
        """
        from transformers import LlavaForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        check_llava(directory)
        self._processor = load_processor(directory)
        check_weight_files(directory)
        with reported(f"{directory} is not a complete LLaVA model"):
            model, report = LlavaForConditionalGeneration.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                dtype="auto",
                output_loading_info=True,
                # Reported below, with names and sizes.
                ignore_mismatched_sizes=True,
            )
        for name, stored, described in sorted(report["mismatched_keys"]):
            raise InputError(
                f"{directory}: config.json describes other weights: {name} is {list(stored)} in "
                f"the files, but {list(described)} by config.json; export the model again"
            )
        if missing := sorted(report["missing_keys"]):
            raise InputError(
                f"{directory}: the files lack weights, which transformers would fill with random "
                f"numbers: {', '.join(missing[:3])} ({len(missing)} in all); export the model again"
            )
        try:
            self._prompts = Prompts(self._processor)
        except ConfigError as error:
            raise ConfigError(f"{directory}: {error}") from error
        self._lead = self._prompts.lead()
        self._read = ImageReader(self._processor.image_processor)
        self.directory = directory
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network: Any = model.to(self.device).eval()

    def inputs(self, questions: Sequence[Question]) -> Any:
        """Model inputs of a batch: input_ids, attention_mask int64 [n, longest], padded on the
        left, and pixel_values float32 [images, 3, height, width] unless there are no images.

        Raises:
            SampleError: an image cannot be used; the message names its question.
        """
        images = [image for question in questions for image in self._images(question)]
        rows = [self._ids(question) for question in questions]
        longest = max(map(len, rows))
        shape = (len(rows), longest)
        ids, mask = torch.full(shape, self._pad_id()), torch.zeros(shape, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, longest - len(row) :] = torch.tensor(row)
            mask[number, longest - len(row) :] = 1
        data = {"input_ids": ids, "attention_mask": mask}
        if images:
            pixels = self._processor.image_processor(images, return_tensors="pt")
            data["pixel_values"] = pixels["pixel_values"]
        return BatchFeature(data)

    def _ids(self, question: Question) -> list[int]:
        """The prompt, with as many image tokens as the images have features."""
        turns = [Turn(turn["role"], turn["content"]) for turn in question.turns]
        try:
            ids = self._prompts.ids(turns)
        except SampleError as error:
            where = f"question {question.id}: " if question.id else ""
            raise InputError(f"{where}{error}") from error
        image = self._processor.tokenizer.convert_tokens_to_ids(self._processor.image_token)
        if image not in ids:
            return ids
        return [
            number for one in ids for number in [one] * (self._image_tokens if one == image else 1)
        ]

    @cached_property
    def _image_tokens(self) -> int:
        """Tokens that the processor writes for one image."""
        image = Image.new("RGB", (50, 30))
        token = self._processor.image_token
        inputs = self._processor(text=[token], images=[image], add_special_tokens=False)
        return len(inputs["input_ids"][0])

    def _pad_id(self) -> int:
        tokenizer = self._processor.tokenizer
        return int(
            next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        )

    def _images(self, question: Question) -> list[Any]:
        """Upright RGB images, decoded as in training."""
        images = []
        for number, data in enumerate(question.images):
            try:
                images.append(self._read(data))
            except SampleError as error:
                name = f"question {question.id}, image {number}" if question.id else "the image"
                raise SampleError(f"{name}: {error}") from error
        return images

    def answers(
        self,
        questions: Sequence[Question],
        batch_size: int,
        max_new_tokens: int,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """The texts of `replies`."""
        return [r.text for r in self.replies(questions, batch_size, max_new_tokens, advance)]

    @torch.inference_mode()
    def replies(
        self,
        questions: Sequence[Question],
        batch_size: int,
        max_new_tokens: int,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[Reply]:
        """Greedy answers in the questions' order. Questions of similar length share a batch."""
        order = sorted(range(len(questions)), key=lambda i: _length(questions[i]))
        replies = [Reply("", is_cut=False)] * len(questions)
        ends = self._end_ids()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = self.inputs([questions[i] for i in chosen]).to(self.device, self.network.dtype)
            with self.threads():
                tokens = self.network.generate(
                    **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
                )
            length = inputs["input_ids"].shape[1]
            written = [row[length:].tolist() for row in tokens]
            spoken = [without_lead(row, self._lead) for row in written]
            texts = self._processor.batch_decode(spoken, skip_special_tokens=True)
            for i, text, row in zip(chosen, texts, written, strict=True):
                replies[i] = Reply(text, len(row) >= max_new_tokens and not ends & {*row})
            advance(len(chosen))
        return replies

    def _end_ids(self) -> set[int]:
        """Tokens that end an answer."""
        ids = self.network.generation_config.eos_token_id
        return {*ids} if isinstance(ids, list) else {ids} - {None}

    @torch.inference_mode()
    def stream(self, question: Question, max_new_tokens: int, write: Callable[[str], None]) -> None:
        """One greedy answer, handed to `write` piece by piece while it grows."""
        inputs = self.inputs([question]).to(self.device, self.network.dtype)
        with self.threads():
            self.network.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                streamer=Stream(self._processor.tokenizer, write, self._lead),
            )  # fmt: skip

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """Within it, torch uses as many CPU threads as speed up a model of this size."""
        before = torch.get_num_threads()
        torch.set_num_threads(1 if self.network.num_parameters() < TINY else before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class Stream(BaseStreamer):  # type: ignore[misc]
    """Writes the text of generated tokens as soon as it is final.

    A character of several tokens is written whole, and texts without spaces do not wait for one.
    The ids `lead`, which the chat template writes before an answer, are not part of it.
    """

    def __init__(
        self, tokenizer: Any, write: Callable[[str], None], lead: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._write, self._lead = tokenizer, write, list(lead)
        self._ids: list[int] | None = None
        self._written = 0

    def put(self, value: torch.Tensor) -> None:
        """Token ids, int64; the first call brings the prompt, which is not written."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        if len(self._ids) < len(self._lead) and self._lead[: len(self._ids)] == self._ids:
            return
        text = self._text()
        if not text.endswith("\ufffd"):
            self._hand_over(text)

    def end(self) -> None:
        """The answer is complete."""
        self._hand_over(self._text())

    def _text(self) -> str:
        ids = without_lead(self._ids or [], self._lead)
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _hand_over(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)


def without_lead(ids: list[int], lead: Sequence[int]) -> list[int]:
    """The ids of an answer, without what the chat template writes before every answer."""
    return ids[len(lead) :] if lead and ids[: len(lead)] == list(lead) else ids


def _length(question: Question) -> tuple[int, int]:
    return len(question.images), sum(len(turn["content"]) for turn in question.turns)
