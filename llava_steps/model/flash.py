"""Flash attention over a packed row on CUDA: torch's own kernels, or FlashAttention 4's.

torch ships the kernels of FlashAttention 2 (Dao, 2023), which were made for Ampere. Those of
FlashAttention 4 (package flash-attn-4: `pip install 'llava-steps[flash]'`) are made for Hopper and
Blackwell; they are compiled for the shapes of their first call. Its release is
pinned to the tested one: the functions used here are internal ones, which torch's autograd does not
see, as a compiled layer requires.

Both are causal within each sample. Both add in the same order in every run if torch uses
deterministic algorithms.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from llava_steps.core.errors import ConfigError
from llava_steps.geometry import flash4
from llava_steps.geometry.flash4 import Asked

Kernel = Literal["torch", "fa4"]


def missing_for_fa4(head_dim: int, asked: Asked = "fa4") -> str:
    """What FlashAttention 4 lacks here if `asked` for; empty if it is used."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return flash4.missing(head_dim, capability, asked)


def choose(asked: Asked, head_dim: int) -> Kernel:
    """The kernel to use. ConfigError if `fa4` is set and cannot be used."""
    missing = missing_for_fa4(head_dim, asked)
    if asked == "fa4" and missing:
        raise ConfigError(f"flash_attention: fa4 needs {missing}; else set it to auto or torch")
    return "torch" if asked == "torch" or missing else "fa4"


def attend(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """q [T, heads, d], k and v [T, kv_heads, d] in 16 bit; borders int32 [n+1] of the n samples,
    of which the longest has at most `longest` tokens -> (result like q, log of the sum of
    exponentials fp32 [heads, T]).
    """
    if kernel == "fa4":
        out, lse, *_ = _fa4()._flash_attn_fwd(
            q, k, v, cu_seqlens_q=borders, cu_seqlens_k=borders, max_seqlen_q=longest,
            max_seqlen_k=longest, softmax_scale=scale, causal=True, return_lse=True,
        )  # fmt: skip
        return out, lse
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, borders, borders, longest, longest, 0.0, True, False, scale=scale
    )
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, borders: Tensor,
    longest: int, scale: float, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, contiguous; arguments as `attend` took and returned them."""
    if kernel == "fa4":
        dq, dk, dv, *_ = _fa4()._flash_attn_bwd(
            q, k, v, out, grad, lse, scale, True, cu_seqlens_q=borders, cu_seqlens_k=borders,
            max_seqlen_q=longest, max_seqlen_k=longest,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv
    state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which is 0
    unused = torch.empty(0, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, borders, borders, longest, longest, 0.0, True, state, unused,
        scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def takes(x: Tensor) -> bool:
    """Whether a flash kernel computes on tensors like x."""
    return x.is_cuda and used(x.dtype)


def used(dtype: torch.dtype) -> bool:
    """Whether a flash kernel computes in `dtype` on this machine."""
    return torch.cuda.is_available() and dtype != torch.float32


@cache
def _fa4() -> Any:
    # A warning of its compiler about an argument that flash-attn-4 does not use here.
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
    interface: Any = importlib.import_module("flash_attn.cute.interface")
    return interface


class Flash(torch.autograd.Function):
    """`attend` with its gradient, for layers that are not compiled."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float,
        kernel: str,
    ) -> Tensor:  # fmt: skip
        out, lse = attend(q, k, v, borders, longest, scale, kernel)
        ctx.save_for_backward(q, k, v, out, lse, borders)
        ctx.how = longest, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, borders = ctx.saved_tensors
        grads = attend_backward(grad.contiguous(), q, k, v, out, lse, borders, *ctx.how)
        return *grads, None, None, None, None
