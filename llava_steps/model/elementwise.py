"""Operations between the products of a layer: the gate of its MLP, rotary embedding, FP8.

On CUDA each is one Triton kernel that reads its inputs once and writes its outputs once; torch's
compiler makes kernels of the backward passes that read them up to three times, because it computes
the parts of a concatenation separately. Elsewhere, the same in plain torch. All add in fp32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

COLUMNS, HEADS, TILE = 1024, 16, (128, 64)
"""Elements of a row, heads of a token, and rows and columns that one Triton program works on."""


def swiglu(x: Tensor) -> Tensor:
    """[n, 2 f], gate before up -> silu(gate) * up [n, f]."""
    if not x.is_cuda:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, width)
    _kernels().swiglu[(rows, -(-width // COLUMNS))](x, out, width, COLUMNS)
    return out


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x."""
    if not x.is_cuda:
        gate, up = x.chunk(2, -1)
        s = torch.sigmoid(gate)
        return torch.cat((grad * up * s * (1 + gate * (1 - s)), grad * gate * s), -1)
    rows, width = grad.shape
    out = torch.empty_like(x)
    _kernels().swiglu_backward[(rows, -(-width // COLUMNS))](grad, x, out, width, COLUMNS)
    return out


def rotary(mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries [T, groups * shared, d] and keys [T, groups, d] of mixed, which is
    [T, groups, shared + 2, d], contiguous: the queries of a group, its key and its value. cos and
    sin are [T, d], both halves equal.
    """
    tokens, groups, parts, width = mixed.shape
    q = mixed.new_empty(tokens, groups * (parts - 2), width)
    k = mixed.new_empty(tokens, groups, width)
    if not mixed.is_cuda:
        turned = _turn(mixed[:, :, :-1], cos, sin)
        q.copy_(turned[:, :, :-1].flatten(1, 2))
        k.copy_(turned[:, :, -1])
        return q, k
    grid = (tokens, -(-groups * (parts - 1) // HEADS))
    half = width // 2
    _kernels().rotary[grid](
        mixed, cos, sin, q, k, groups, parts - 2, half, power_of_two(half), HEADS
    )
    return q, k


def rotary_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of `mixed` from contiguous gradients of queries, keys and values."""
    tokens, groups, width = dk.shape
    shared = dq.shape[1] // groups
    if not dq.is_cuda:
        turned = torch.cat((dq.view(tokens, groups, shared, width), dk[:, :, None]), 2)
        return torch.cat((_turn(turned, cos, -sin), dv[:, :, None]), 2)
    out = dq.new_empty(tokens, groups, shared + 2, width)
    grid = (tokens, -(-groups * (shared + 2) // HEADS))
    half = width // 2
    _kernels().rotary_backward[grid](
        dq, dk, dv, cos, sin, out, groups, shared, half, power_of_two(half), HEADS
    )
    return out


def fp8_round(
    x: Tensor, scale: Tensor, dtype: torch.dtype, straight: bool = False, across: bool = False
) -> tuple[Tensor, Tensor]:
    """x [n, k] over scale fp32 [] in `dtype`, as [n, k] and as [k, n]; empty if not wanted."""
    (rows, columns), most = x.shape, torch.finfo(dtype).max
    x = x.contiguous()
    first = x.new_empty((rows, columns) if straight else 0, dtype=dtype)
    second = x.new_empty((columns, rows) if across else 0, dtype=dtype)
    if not x.is_cuda:
        rounded = (x.float() / scale).clamp(-most, most).to(dtype)
        if straight:
            first.copy_(rounded)
        if across:
            second.copy_(rounded.t())
        return first, second
    tall, wide = TILE
    _kernels().fp8_round[(-(-rows // tall), -(-columns // wide))](
        x, scale, first, second, rows, columns, most, straight, across, tall, wide
    )
    return first, second


def power_of_two(size: int) -> int:
    """The smallest one that is not below `size`."""
    return 1 << (size - 1).bit_length()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None, None], sin[:, None, None]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@cache
def _kernels() -> Any:
    from llava_steps.model import triton_kernels

    return triton_kernels
