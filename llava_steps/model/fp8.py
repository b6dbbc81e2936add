"""FP8 products of compiled layers, by torch's own scaled matrix products.

One scale per tensor, computed from its largest magnitude in every microbatch: values and
weights E4M3, gradients E5M2 (Micikevicius et al. 2022, arXiv:2209.05433). The compiler sees the
scale and computes it with the operation that made the tensor. A product, with the rounding of its
factors, is a separate operation like those of kernels.py, and adds the gradient of a weight to
`main_grad` like them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_steps.model.elementwise import fp8_round

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 []: x over it just fits into `dtype`.

    Values that are not finite make the scale, and so the whole product, not finite.
    """
    # The largest of each row first: the compiler can compute it with the row.
    peak = x.abs().amax(-1).amax().float()
    return (peak / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)


def product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a [n, k] b^T [k, m] of FP8 tensors in rows, b [m, k], times both scales -> [n, m] in `dtype`.

    Hopper multiplies FP8 only along the contiguous dimension of both. `fast` accumulates within a
    tile in less than fp32, as is usual for the forward pass.
    """
    one = F.ScalingType.TensorWise
    out: Tensor = F.scaled_mm(
        a, b.t(), scale_a, one, scale_b, one, output_dtype=dtype, use_fast_accum=fast
    )
    return out


@torch.library.custom_op("llava_steps::fp8_linear", mutates_args=())
def fp8_linear(
    x: Tensor, weight: Tensor, main: Tensor, scale_x: Tensor, scale_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """x [n, in], weight [out, in] -> x weight^T [n, out], and x^T in FP8 [in, n] for the gradient
    of a trained weight (else empty).
    """
    rounded, x_t = fp8_round(x, scale_x, VALUES, straight=True, across=main.numel() > 0)
    rounded_weight, _ = fp8_round(weight, scale_weight, VALUES, straight=True)
    return product(rounded, rounded_weight, scale_x, scale_weight, x.dtype, fast=True), x_t


@fp8_linear.register_fake
def _(
    x: Tensor, weight: Tensor, main: Tensor, scale_x: Tensor, scale_weight: Tensor
) -> tuple[Tensor, Tensor]:
    across = (x.shape[1], x.shape[0]) if main.numel() else (0,)
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(across, dtype=VALUES)


@torch.library.custom_op("llava_steps::fp8_linear_backward", mutates_args=())
def fp8_linear_backward(
    grad: Tensor, x_t: Tensor, weight: Tensor, main: Tensor, scale_grad: Tensor, scale_x: Tensor,
    scale_weight: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient [n, in] of x; that of the weight is added to `main`, if it has elements."""
    trained = main.numel() > 0
    rounded, grad_t = fp8_round(grad, scale_grad, GRADIENTS, straight=True, across=trained)
    if trained:
        main.data.add_(product(grad_t, x_t, scale_grad, scale_x, torch.float32))
    _, weight_t = fp8_round(weight, scale_weight, VALUES, across=True)
    return product(rounded, weight_t, scale_grad, scale_weight, grad.dtype)


@fp8_linear_backward.register_fake
def _(
    grad: Tensor, x_t: Tensor, weight: Tensor, main: Tensor, scale_grad: Tensor, scale_x: Tensor,
    scale_weight: Tensor,
) -> Tensor:  # fmt: skip
    return grad.new_empty(grad.shape[0], weight.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[1:])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x_t, weight, main, scale_x, scale_weight = ctx.saved_tensors
    scales = scale_of(grad, GRADIENTS), scale_x, scale_weight
    return fp8_linear_backward(grad, x_t, weight, main, *scales), None, None, None, None


fp8_linear.register_autograd(_backward, setup_context=_keep)


def linear(x: Tensor, weight: Tensor, main: Tensor) -> Tensor:
    """x bf16 [n, in], weight [out, in] -> x weight^T bf16 [n, out], as `kernels.linear`, in FP8.

    n, in and out are multiples of 16 (`geometry.layout.check_fp8`, `training.forward.ROW`).
    """
    scales = scale_of(x.detach(), VALUES), scale_of(weight, VALUES)
    out: Tensor = fp8_linear(x, weight, main, *scales)[0]
    return out
