"""Sums over a global batch, and those of each dataset of a blend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_steps.data.loader.batch import MicroBatch
from llava_steps.data.samples.encoded import IGNORED
from llava_steps.model.attention import upload


class BatchStats:
    """Sums over the global batch, the same on every rank."""

    def __init__(self, values: Tensor, micro: list[float], datasets: Sequence[str] = ()) -> None:
        self.loss, self.supervised, self.tokens, *more = values.tolist()
        self.images, self.squares, self.samples, *rest = more
        self.micro = micro
        """Loss sums of this rank's microbatches; empty before the last pipeline stage."""
        parts = zip(rest[: len(datasets)], rest[len(datasets) :], strict=True)
        self.by_dataset = {
            name: part / count for name, (part, count) in zip(datasets, parts, strict=True) if count
        }
        """Loss per supervised token of each dataset that has any in this batch."""

    @property
    def mean(self) -> float:
        """Loss per supervised token; NaN without any."""
        return self.loss / self.supervised if self.supervised else math.nan


def counts(batch: Sequence[MicroBatch]) -> list[int]:
    """Supervised positions, tokens, images, squared lengths of samples and samples of some rows."""
    lengths = [
        b - a
        for row in batch
        for a, b in itertools.pairwise(row.cu_seqlens[: len(row.datasets) + 1].tolist())
    ]
    return [
        sum(row.num_supervised for row in batch),
        sum(row.num_tokens for row in batch),
        sum(row.num_images for row in batch),
        sum(length * length for length in lengths),
        len(lengths),
    ]


@torch.no_grad()
def by_dataset(losses: Tensor, batch: MicroBatch, datasets: Sequence[str]) -> Tensor:
    """float64 [2 * datasets]: loss sums of the samples of each dataset, then their targets.

    `losses` [targets] are those of the row `batch`, in order.
    """
    borders = batch.cu_seqlens[: len(batch.datasets) + 1].tolist()
    supervised = (batch.labels[0] != IGNORED).long()
    counts = torch.stack([supervised[a:b].sum() for a, b in itertools.pairwise(borders)])
    numbers = torch.tensor([datasets.index(name) for name in batch.datasets])
    owners = F.one_hot(torch.repeat_interleave(numbers, counts), len(datasets)).T
    loss_sums = (upload(owners, losses.device) * losses.double()).sum(dim=1)
    counted = upload(owners.sum(dim=1).to(loss_sums.dtype), loss_sums.device)
    return torch.cat([loss_sums, counted])
