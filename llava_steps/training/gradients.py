"""Gradients of one global batch, and what its losses add up to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from llava_steps.data.loader.batch import MicroBatch
from llava_steps.training import forward, parallel
from llava_steps.training.batch_stats import BatchStats, by_dataset, counts
from llava_steps.training.optimizer import Optimizer


def forward_backward(
    wrapped: list[DistributedDataParallel],
    optimizer: Optimizer,
    batch: list[MicroBatch],
    datasets: Sequence[str],
    beat: Callable[[], None],
    meanwhile: Callable[[], None],
) -> BatchStats:
    """Gradients of the token mean over the global batch, left in the gradient buffers.

    With `datasets` the loss of each of them is reported as well. There is a `beat` for each
    microbatch. `meanwhile` is called when a GPU has all its work and this process none. The pixels
    of `batch` are gone afterwards.
    """
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    config = wrapped[0].config

    def finalize(*args: Any, **kwargs: Any) -> None:
        # All work is on its way to the GPU, for which the host is about to wait. Giving back the
        # memory of pixels takes a while, and so does the next batch.
        batch[:] = [replace(m, pixel_values=None) for m in batch]
        meanwhile()
        finalize_model_grads(*args, **kwargs)

    config.finalize_model_grads_func = finalize
    waits = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = waits if len(waits) > 1 else waits[0]
    step = functools.partial(forward_step, datasets=datasets)
    losses = forward.run(step, wrapped, batch, functools.partial(beating, beat=beat))
    device = parallel.device()
    columns = 1 + 2 * len(datasets)
    table = torch.stack(losses) if losses else torch.zeros(0, columns, device=device)
    micro = table[:, 0].tolist()
    first = torch.tensor([sum(micro), *counts(batch)], dtype=torch.float64, device=device)
    own = torch.cat([first, table[:, 1:].double().sum(dim=0)])
    return BatchStats(parallel.total(own), micro, datasets)


def beating(batch: Sequence[MicroBatch], beat: Callable[[], None]) -> Iterator[MicroBatch]:
    """The microbatches, with a beat before each."""
    for item in batch:
        beat()
        yield item


def forward_step(
    batches: Iterator[MicroBatch], wrapped: Any, datasets: Sequence[str] = ()
) -> tuple[Tensor, Any]:
    """One microbatch through this chunk, in the form that Megatron's schedules ask for."""
    batch = next(batches)

    def loss_sum(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = losses.sum()
        parts = [total.detach().double()[None]]
        if datasets:
            parts.append(by_dataset(losses, batch, datasets))
        return total, forward.count(losses, losses.numel()), torch.cat(parts)

    return forward.through(batch, wrapped), loss_sum
