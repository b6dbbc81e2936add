"""The positions that the head computes, and what their logits give besides the loss.

Each tensor-parallel rank holds a part of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from torch import Tensor

from llava_steps.data.samples.encoded import IGNORED
from llava_steps.geometry.layout import filled
from llava_steps.model.attention import upload


class Targets(NamedTuple):
    """The positions of a row that have a label."""

    positions: Tensor
    """int64 [n] on the model's device, like their labels."""
    ids: Tensor
    number: int
    """How many there are; the rest is padding, whose losses are dropped."""
    exclusive: bool
    """After the attention of the last layer only these are computed."""


def targets_of(labels: Tensor, device: torch.device, exclusive: bool) -> Targets:
    """From labels int64 [1, T] on the host; padded if they are `exclusive`."""
    positions = (labels[0] != IGNORED).nonzero().squeeze(1)
    count = positions.numel()
    fill = filled(count) - count if exclusive else 0
    ids = F.pad(labels[0, positions], (0, fill))
    positions, ids = (upload(x, device) for x in (F.pad(positions, (0, fill)), ids))
    return Targets(positions, ids, count, exclusive)


@torch.no_grad()
def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether no logit is higher than the target's: fp32 [n] of 0 and 1, the same on every rank.

    logits [n, vocab / tp], targets int64 [n]. A collective call of the tensor-parallel ranks.
    """
    size, group = logits.shape[-1], ps.get_tensor_model_parallel_group()
    own = targets - ps.get_tensor_model_parallel_rank() * size
    here = (own >= 0) & (own < size)
    chosen = logits.gather(1, own.clamp(0, size - 1)[:, None]).squeeze(1)
    chosen = torch.where(here, chosen, torch.full_like(chosen, -torch.inf))
    highest = logits.amax(dim=-1)
    dist.all_reduce(chosen, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    return (chosen >= highest).float()


@torch.no_grad()
def best(logits: Tensor) -> Tensor:
    """The id with the highest logit, int64 [n]; the lowest such rank's where several are equal.

    logits [n, vocab / tp]. A collective call of the tensor-parallel ranks.
    """
    value, index = logits.max(dim=-1)
    index = index + ps.get_tensor_model_parallel_rank() * logits.shape[-1]
    parts, group = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_group()
    values, indices = (x.new_empty(parts * len(x)) for x in (value, index))
    dist.all_gather_into_tensor(values, value.contiguous(), group=group)
    dist.all_gather_into_tensor(indices, index.contiguous(), group=group)
    values, indices = values.view(parts, -1), indices.view(parts, -1)
    rank = (values == values.amax(dim=0)).int().argmax(dim=0)
    return indices.gather(0, rank[None]).squeeze(0)
