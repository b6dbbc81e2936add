"""Causal attention over one packed row of samples, without Transformer Engine.

`Packed` is built once per microbatch and passed to every layer as megatron-core's
`packed_seq_params`, which activation recomputation keeps in a closure. It holds the boundaries of
the samples, the rotary table of the row and, for the dense kernel, the indices that move between
the packed row and a right-padded [n, L] batch.

Two kernels, one result: flash attention (flash.py) on CUDA in bf16, and torch's SDPA over the
right-padded batch everywhere else (CPU, and fp32 on CUDA). Right padding needs no mask: with causal
attention no real token attends to it, and its outputs are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_steps.conversion.rope import rotate
from llava_steps.core.errors import InputError
from llava_steps.model import flash


@dataclass(frozen=True, eq=False)
class Packed:
    """One packed row: n samples in T tokens (padding at the end is a separate sample).

    cu_seqlens int32 [n+1]; cos, sin [T, 1, 1, head_dim]; to_dense int64 [n*L] and to_packed
    int64 [T], or None where the row is its own dense batch (one sample) or needs none.
    kernel: the one of flash.py, or None for the dense batch.
    longest int64 [] on the host: max_seqlen, as a tensor: not a constant to a compiler.
    chosen int64 [n]: positions that the model's last layer returns; None for all of them.
    """

    # Read by megatron-core's attention: "sbhd" keeps [T, 1, heads, head_dim] as it is.
    qkv_format = "sbhd"

    cu_seqlens: Tensor
    max_seqlen: int
    cos: Tensor
    sin: Tensor
    kernel: flash.Kernel | None
    to_dense: Tensor | None
    to_packed: Tensor | None
    longest: Tensor
    chosen: Tensor | None = None

    def chosen_by(self, layer: Any) -> Tensor | None:
        """The positions that a megatron-core layer keeps after its attention; None for all."""
        return self.chosen if layer.layer_number == layer.config.num_layers else None

    @property
    def samples(self) -> int:
        return self.cu_seqlens.numel() - 1


def pack(
    cu_seqlens: Tensor,
    max_seqlen: int,
    cos: Tensor,
    sin: Tensor,
    compiled: bool = False,
    kernel: flash.Kernel = "torch",
    chosen: Tensor | None = None,
) -> Packed:
    """The `Packed` of a row of T tokens; cos and sin are [T, head_dim] in the compute dtype.
    Layers with their own kernels (`compiled`) need no dense indices. `kernel` is used where flash
    attention can run. `chosen` is on the device of cos.

    Boundaries are checked where reading them is free (on CPU): InputError if they do not
    cover the row or if a sample is longer than max_seqlen.
    """
    tokens = cos.shape[0]
    if cu_seqlens.device.type == "cpu":
        _check(cu_seqlens, max_seqlen, tokens)
    cu_seqlens = upload(cu_seqlens.to(torch.int32), cos.device)
    used = kernel if flash.takes(cos) else None
    to_dense = to_packed = None
    samples = cu_seqlens.numel() - 1
    if not (used or compiled) and samples > 1:
        starts = cu_seqlens[:-1].long()
        token = torch.arange(tokens, device=cos.device)
        sample = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
        to_packed = sample * max_seqlen + token - starts[sample]
        columns = torch.arange(max_seqlen, device=cos.device)
        # Padding positions point at a real row: its values are finite and the outputs are not read.
        to_dense = (starts[:, None] + columns).clamp_(max=tokens - 1).flatten()
    return Packed(
        cu_seqlens,
        max_seqlen,
        cos[:, None, None],
        sin[:, None, None],
        used,
        to_dense,
        to_packed,
        torch.tensor(max_seqlen, device="cpu"),
        chosen,
    )


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host does not wait for the copy."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        # A copy from pageable memory would wait for all pending work of the GPU.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _check(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> None:
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (lengths <= 0).any():
        raise InputError(
            f"cu_seqlens {cu_seqlens.tolist()} does not split {tokens} tokens into samples; "
            "padding at the end of the row must be a separate sample"
        )
    if lengths.max() > max_seqlen:
        raise InputError(f"a sample of {int(lengths.max())} tokens exceeds max_seqlen {max_seqlen}")


class PackedAttention(torch.nn.Module):
    """core_attention of the `local` spec: rotary embedding, then causal attention per sample."""

    def __init__(self, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Packed,
        **_: Any,
    ) -> Tensor:
        """query [T, 1, heads, d], key and value [T, 1, kv_heads, d] -> [T, 1, heads * d]."""
        packed = packed_seq_params
        query = rotate(query, packed.cos, packed.sin).squeeze(1)
        key = rotate(key, packed.cos, packed.sin).squeeze(1)
        value = value.squeeze(1)
        kernel = flash_kernel if packed.kernel else dense_kernel
        return kernel(query, key, value, packed, self.softmax_scale).flatten(1).unsqueeze(1)


def dense_kernel(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float | None) -> Tensor:
    """SDPA over the right-padded batch. q [T, heads, d], k and v [T, kv_heads, d] -> like q."""

    def dense(x: Tensor) -> Tensor:
        if packed.to_dense is not None:
            x = x.index_select(0, packed.to_dense)
        return x.view(packed.samples, -1, *x.shape[1:]).transpose(1, 2)

    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        dense(q), dense(k), dense(v), is_causal=True, scale=scale, enable_gqa=grouped
    )
    out = out.transpose(1, 2).flatten(0, 1)
    return out if packed.to_packed is None else out.index_select(0, packed.to_packed)


def flash_kernel(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float | None) -> Tensor:
    """Flash attention over the packed row (CUDA, 16 bit). Shapes as in dense_kernel."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = flash.Flash.apply(  # type: ignore[no-untyped-call]
        q.contiguous(), k.contiguous(), v.contiguous(), packed.cu_seqlens, packed.max_seqlen, scale,
        packed.kernel,
    )  # fmt: skip
    return out
