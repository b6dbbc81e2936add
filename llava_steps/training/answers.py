"""Greedy answers to a few fixed questions, from the model as it is being trained.

The questions are the first ones of the first samples of the val split. One data-parallel replica
answers them, in any layout; nothing is kept between tokens, so this is for a few short answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor

from llava_steps.data.loader.batch import MicroBatch, pad, round_up
from llava_steps.data.loader.validation_set import ValidationSet
from llava_steps.data.samples.encoded import IGNORED
from llava_steps.launch.job import Job
from llava_steps.training import forward
from llava_steps.training.share import loader_spec
from llava_steps.training.validation import forward_only


class Answers:
    """The questions of a job, as many as `eval_answers` says."""

    def __init__(self, job: Job) -> None:
        stage = job.stage
        self._limit = stage.eval_new_tokens
        self._multiple = forward.row_multiple(stage)
        self._rows = stage.pipeline_model_parallel
        self._data = None
        if ps.get_data_parallel_rank() == 0:
            # Every rank of the first stage decodes all images: they go to the model as they are.
            spec = replace(
                loader_spec(job, "val"),
                micro_batch_size=1,
                dp_size=1,
                image_part=0,
                image_parts=1,
            )
            self._data = ValidationSet(spec, stage.eval_answers)

    def __call__(self, wrapped: Any, beat: Callable[[], None]) -> list[dict[str, str]]:
        """A row for each question: id, question, answer, reference; empty on other replicas."""
        if self._data is None:
            return []
        return [self._answer(wrapped, row, beat) for (row,) in self._data.groups(1, 1)]

    def _answer(self, wrapped: Any, row: MicroBatch, beat: Callable[[], None]) -> dict[str, str]:
        assert self._data is not None
        encoder = self._data.encoder
        labels = row.labels[0].tolist()
        start = next(i for i, label in enumerate(labels) if label != IGNORED)
        prompt = row.tokens[0, : start + 1].tolist()
        reference = []
        for label in labels[start:]:
            if label == IGNORED or label in encoder.end_ids:
                break
            reference.append(label)
        images = prompt.count(encoder.image_token_id) // encoder.tokens_per_image
        pixels = None if row.pixel_values is None or not images else row.pixel_values[:images]
        answer: list[int] = []
        while len(answer) < self._limit:
            token = self._next(wrapped, [*prompt, *answer], pixels)
            beat()
            if token in encoder.end_ids:
                break
            answer.append(token)
        shown = [
            t for i, t in enumerate(prompt) if t != encoder.image_token_id or prompt[i - 1] != t
        ]
        return {
            "id": row.sample_ids[0],
            "question": encoder.decode(shown),
            "answer": encoder.decode(answer),
            "reference": encoder.decode(reference),
        }

    def _next(self, wrapped: Any, tokens: list[int], pixels: Tensor | None) -> int:
        """The most likely next token; a collective call of the ranks of the replica."""
        assert self._data is not None
        length = len(tokens)
        row = MicroBatch(
            tokens=torch.tensor([tokens]),
            labels=torch.tensor([[*[IGNORED] * (length - 1), 0]]),
            position_ids=torch.arange(length)[None],
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            max_seqlen=length,
            pixel_values=pixels,
            num_images=0 if pixels is None else len(pixels),
            sample_ids=[], keys=[], slots=[], datasets=[],
            num_supervised=1,
            num_tokens=length,
        )  # fmt: skip
        row = pad(row, round_up(length, self._multiple), self._data.encoder.pad_id)
        # Interleaved pipelines want a row for each stage; the copies say the same.
        total = forward_only(wrapped, [row] * self._rows, next_step)
        token = (total / self._rows).round().long().reshape(1)
        dist.broadcast(
            token,
            ps.get_pipeline_model_parallel_last_rank(),
            group=ps.get_pipeline_model_parallel_group(),
        )
        return int(token)


def next_step(batches: Iterator[MicroBatch], wrapped: Any) -> tuple[Tensor, Any]:
    """One row through this stage; at its end float64 []: the id that comes next."""

    def id_(best: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return best.sum(), forward.count(best, 1), best.double().sum()

    return forward.through(next(batches), wrapped, "next", lambda row: row.pixel_values), id_
