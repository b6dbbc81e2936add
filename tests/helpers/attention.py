"""Causal attention in plain torch, a reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def causal(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """q [T, heads, d], k and v [T, kv_heads, d], samples of these lengths -> [T, heads, d]."""
    done = []
    repeats = q.shape[1] // k.shape[1]
    for a, b, c in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        b, c = (x.repeat_interleave(repeats, 1) for x in (b, c))
        scores = torch.einsum("thd,uhd->htu", a, b) * scale
        future = torch.ones(len(a), len(a), dtype=torch.bool, device=a.device).triu(1)
        done.append(
            torch.einsum("htu,uhd->thd", scores.masked_fill(future, -torch.inf).softmax(-1), c)
        )
    return torch.cat(done)
