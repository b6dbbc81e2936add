"""The Triton kernels of elementwise.py. Imported only on CUDA: elsewhere Triton is missing."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu(x, out, width, COLUMNS: tl.constexpr):
    """One row's part: out = silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < width
    gate = tl.load(x + row * 2 * width + at, inside).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + at, inside).to(tl.float32)
    tl.store(out + row * width + at, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def swiglu_backward(grad, x, out, width, COLUMNS: tl.constexpr):
    """One row's part of the gradients of gate and up."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < width
    g = tl.load(grad + row * width + at, inside).to(tl.float32)
    gate = tl.load(x + row * 2 * width + at, inside).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + at, inside).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(out + row * 2 * width + at, g * up * s * (1 + gate * (1 - s)), inside)
    tl.store(out + row * 2 * width + width + at, g * gate * s, inside)


@triton.jit
def rotary(
    mixed, cos, sin, q, k, groups, shared, half: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Some of one token's queries and keys, rotated."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = head < groups * (shared + 1)
    group, part = head // (shared + 1), head % (shared + 1)
    at = tl.arange(0, HALF)
    narrow = (at < half)[None, :]
    c = tl.load(cos + token * 2 * half + at, at < half, 0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * 2 * half + at, at < half, 0.0).to(tl.float32)[None, :]
    source = token * groups * (shared + 2) + group * (shared + 2) + part
    first = mixed + source[:, None] * 2 * half + at[None, :]
    x = tl.load(first, inside[:, None] & narrow).to(tl.float32)
    y = tl.load(first + half, inside[:, None] & narrow).to(tl.float32)
    is_q, is_k = inside & (part < shared), inside & (part == shared)
    to_q = q + (token * groups * shared + group * shared + part)[:, None] * 2 * half + at[None, :]
    to_k = k + (token * groups + group)[:, None] * 2 * half + at[None, :]
    tl.store(to_q, x * c - y * s, is_q[:, None] & narrow)
    tl.store(to_q + half, y * c + x * s, is_q[:, None] & narrow)
    tl.store(to_k, x * c - y * s, is_k[:, None] & narrow)
    tl.store(to_k + half, y * c + x * s, is_k[:, None] & narrow)


@triton.jit
def rotary_backward(
    dq, dk, dv, cos, sin, out, groups, shared, half: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """The gradients of some of one token's queries, keys and values, rotated back and mixed."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = head < groups * (shared + 2)
    group, part = head // (shared + 2), head % (shared + 2)
    at = tl.arange(0, HALF)
    narrow = (at < half)[None, :]
    is_q, is_k = inside & (part < shared), inside & (part == shared)
    is_v = inside & (part > shared)
    of_q = dq + (token * groups * shared + group * shared + part)[:, None] * 2 * half + at[None, :]
    of_group = (token * groups + group)[:, None] * 2 * half + at[None, :]
    x = tl.load(of_q, is_q[:, None] & narrow, 0.0).to(tl.float32)
    y = tl.load(of_q + half, is_q[:, None] & narrow, 0.0).to(tl.float32)
    x += tl.load(dk + of_group, is_k[:, None] & narrow, 0.0).to(tl.float32)
    y += tl.load(dk + of_group + half, is_k[:, None] & narrow, 0.0).to(tl.float32)
    x += tl.load(dv + of_group, is_v[:, None] & narrow, 0.0).to(tl.float32)
    y += tl.load(dv + of_group + half, is_v[:, None] & narrow, 0.0).to(tl.float32)
    c = tl.load(cos + token * 2 * half + at, at < half, 0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * 2 * half + at, at < half, 0.0).to(tl.float32)[None, :]
    c = tl.where(is_v[:, None], 1.0, c)
    s = tl.where(is_v[:, None], 0.0, s)
    target = token * groups * (shared + 2) + head
    first = out + target[:, None] * 2 * half + at[None, :]
    tl.store(first, x * c + y * s, inside[:, None] & narrow)
    tl.store(first + half, y * c - x * s, inside[:, None] & narrow)


@triton.jit
def fp8_round(
    x, scale, straight, across, rows, columns, most: tl.constexpr, STRAIGHT: tl.constexpr,
    ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile divided by the scale, within the range of FP8, and its transpose."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    value = tl.load(x + at, inside, 0.0).to(tl.float32) / tl.load(scale)
    value = tl.minimum(tl.maximum(value, -most), most)
    if STRAIGHT:
        tl.store(straight + at, value.to(straight.dtype.element_ty), inside)
    if ACROSS:
        turned = tl.trans(value.to(across.dtype.element_ty))
        at = column[:, None] * rows + row[None, :]
        tl.store(across + at, turned, tl.trans(inside))
