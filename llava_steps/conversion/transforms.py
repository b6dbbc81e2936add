"""Pure tensor functions between Hugging Face weights and megatron-core's fused ones.

Each transform is exact in both directions: it only moves values, never computes with them. Each
accepts only its number of parts (ValueError), to detect rows of the mapping table with the wrong
transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_steps.geometry.geometry import Geometry


@dataclass(frozen=True)
class Transform:
    """`fuse` makes one Megatron tensor from several HF ones; `split` is its exact inverse."""

    fuse: Callable[[Sequence[Tensor], Geometry], Tensor]
    split: Callable[[Tensor, Geometry], tuple[Tensor, ...]]


def _fuse_one(parts: Sequence[Tensor], geometry: Geometry) -> Tensor:
    (part,) = parts
    return part


def _split_one(fused: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
    return (fused,)


def fuse_qkv(parts: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """q [heads*d, ...], k and v [kv_heads*d, ...] -> [(heads + 2 kv_heads)*d, ...].

    megatron-core orders the rows by query group: the q heads of a group, its k, its v.
    """
    query, key, value = parts
    groups, rest = geometry.kv_heads, query.shape[1:]
    grouped = [part.reshape(groups, -1, *rest) for part in (query, key, value)]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def split_qkv(fused: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
    """The inverse of fuse_qkv."""
    d, rest = geometry.head_dim, fused.shape[1:]
    per_group = geometry.heads // geometry.kv_heads * d
    grouped = fused.reshape(geometry.kv_heads, per_group + 2 * d, *rest)
    return tuple(part.reshape(-1, *rest) for part in torch.split(grouped, [per_group, d, d], dim=1))


def fuse_gate_up(parts: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """gate [ffn, ...], up [ffn, ...] -> [2 ffn, ...], gate first."""
    gate, up = parts
    return torch.cat((gate, up))


def split_gate_up(fused: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
    """The inverse of fuse_gate_up."""
    gate, up = torch.split(fused, geometry.ffn)
    return gate, up


TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(_fuse_one, _split_one),
    "qkv": Transform(fuse_qkv, split_qkv),
    "gate_up": Transform(fuse_gate_up, split_gate_up),
}
