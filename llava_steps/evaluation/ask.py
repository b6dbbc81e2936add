"""Questions of a LLaVA file, answered by a Hugging Face directory with plain transformers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava_steps.core.errors import InputError
from llava_steps.data import rawllava, sources
from llava_steps.data.samples import SampleError

MAX_PIXELS = 25_000_000
PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Question:
    """The last question of a conversation, with what was said before it."""

    id: str
    group: str
    """Kind and language, as "what_digit/en"; "questions" when the file does not say."""
    turns: tuple[dict[str, str], ...]
    """role and content, from the first turn to the question."""
    images: tuple[bytes, ...]
    reference: str


def read_questions(path: Path) -> list[Question]:
    """All questions of a LLaVA JSON or JSONL file.

    Raises:
        InputError: the file, or any of its samples, cannot be used: leaving out what is difficult
            would change what an accuracy means.
    """
    found = []
    for chunk in sources.chunks(path, 1000):
        for index, record in enumerate(chunk.records, chunk.start):
            try:
                sample = rawllava.to_sample(sources.parse(record), index, path.parent, MAX_PIXELS)
            except SampleError as error:
                raise InputError(f"{path}, record {index}: {error}") from error
            turns = tuple({"role": t.role, "content": t.content} for t in sample.turns)
            names = [sample.extra.get(key) for key in ("kind", "lang")]
            group = "/".join(str(name) for name in names if name) or "questions"
            reference = turns[-1]["content"]
            found.append(Question(sample.id, group, turns[:-1], sample.images, reference))
    if not found:
        raise InputError(f"{path} holds no questions")
    return found


class Model:
    """A Hugging Face LLaVA directory, on the GPU if there is one."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._processor = AutoProcessor.from_pretrained(
            directory, backend="pil", local_files_only=True
        )
        self._processor.tokenizer.padding_side = "left"
        model, report = LlavaForConditionalGeneration.from_pretrained(
            directory, local_files_only=True, dtype="auto", output_loading_info=True
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise InputError(f"{directory}: weights are missing: {report['missing_keys']}")
        self._model = model.to(self._device).eval()

    def prompt(self, turns: Sequence[dict[str, str]]) -> str:
        """The chat template's text up to where the answer begins."""
        image = self._processor.image_token
        said = [turn | {"content": turn["content"].replace(PLACEHOLDER, image)} for turn in turns]
        text: str = self._processor.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True
        )
        return text

    def inputs(self, questions: Sequence[Question]) -> Any:
        """Model inputs of a batch, padded on the left."""
        images = [load(data) for question in questions for data in question.images]
        return self._processor(
            text=[self.prompt(question.turns) for question in questions],
            images=images or None,
            padding=True,
            add_special_tokens=False,
            return_tensors="pt",
        )

    @torch.inference_mode()
    def answers(
        self,
        questions: Sequence[Question],
        batch_size: int,
        max_new_tokens: int,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """Greedy answers in the questions' order. Questions of like length share a batch."""
        order = sorted(range(len(questions)), key=lambda i: _length(questions[i]))
        found = [""] * len(questions)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = self.inputs([questions[i] for i in chosen]).to(self._device, self._model.dtype)
            tokens = self._model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
            )
            texts = self._processor.batch_decode(
                tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, text in zip(chosen, texts, strict=True):
                found[i] = text
            advance(len(chosen))
        return found


def load(data: bytes) -> Image.Image:
    """An encoded image as transformers loads it: upright, RGB."""
    from transformers.image_utils import load_image

    loaded: Image.Image = load_image(Image.open(io.BytesIO(data)))
    return loaded


def _length(question: Question) -> tuple[int, int]:
    return len(question.images), sum(len(turn["content"]) for turn in question.turns)
