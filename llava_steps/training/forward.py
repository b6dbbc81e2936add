"""Rows through the chunks of a rank: in training, validation and sample answers alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from llava_steps.data.loader.batch import MicroBatch
from llava_steps.settings.stage.stage import Stage
from llava_steps.training.exchange import whole_images

ROW = 128
"""Rows of compiled layers are multiples of this, as the tiles of matrix products are, and as the
blocks of FP8 products are."""

Step = Callable[[Iterator[MicroBatch], Any], tuple[Tensor, Any]]


def compiles(stage: Stage) -> bool:
    """Whether this training compiles its layers."""
    return stage.compiles(torch.cuda.is_available())


def row_multiple(stage: Stage) -> int:
    """The length of every row is a multiple of this."""
    if compiles(stage):
        return ROW
    parts = stage.tensor_model_parallel if stage.sequence_parallel else 1
    return ROW * parts if stage.transformer_engine else parts


def run(
    step: Step,
    wrapped: Sequence[Any],
    batch: Sequence[MicroBatch],
    stream: Callable[[Sequence[MicroBatch]], Iterator[MicroBatch]] = iter,
    forward_only: bool = False,
) -> list[Tensor]:
    """Rows of one length through the pipeline; what `step` reports of each, on the last stage.

    A collective call of the ranks of one replica. `stream` is the way each chunk reads the rows.
    """
    streams = [stream(batch) for _ in wrapped]
    outputs: list[Tensor] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=streams if len(streams) > 1 else streams[0],
        model=list(wrapped),
        num_microbatches=len(batch),
        seq_length=batch[0].tokens.shape[1],
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return outputs


def through(
    row: MicroBatch,
    wrapped: Any,
    wanted: Literal["loss", "score", "next"] = "loss",
    images: Callable[[MicroBatch], Tensor | None] = whole_images,
) -> Tensor:
    """One row through one chunk: what `Llava.forward` makes of it.

    The row stays on the host, which reads it there and never waits for a GPU. `images` gives the
    pixels of all images; only the first chunk calls it.
    """
    output: Tensor = wrapped(
        row.tokens,
        row.position_ids,
        row.cu_seqlens,
        row.max_seqlen,
        images(row) if unwrap_model(wrapped).pre_process else None,
        row.labels,
        wanted,
    )
    return output


def count(losses: Tensor, number: int) -> Tensor:
    """int32 []: `number` on the device of `losses`.

    Filled there: a number from the host would wait for all work before it.
    """
    return torch.full((), number, dtype=torch.int, device=losses.device)
