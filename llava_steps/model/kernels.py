"""The operations that a compiled layer calls: products with a weight, attention, a word look-up.

torch.compile sees each as one opaque operation. The gradient of a weight is not a separate tensor.
It is added, within the product on CUDA, to megatron-core's fp32 gradient (`main_grad`), which is
declared to the compiler as read-only. This is safe because no other code uses these gradients while
a backward pass runs: they are zeroed before the first microbatch and reduced after the last.

`main` is that gradient, or an empty tensor where the weight is frozen or nothing is differentiated.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_steps.model import elementwise, flash


def add_product(main: Tensor, grad: Tensor, x: Tensor) -> None:
    """main fp32 [out, in] += grad^T x, for grad [n, out] and x [n, in]."""
    main = main.data  # hides the in-place change from autograd, which saved it for backward
    if main.is_cuda and grad.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(main, grad.t(), x, torch.float32, out=main)
    else:
        main.addmm_(grad.t().float(), x.float())


@torch.library.custom_op("llava_steps::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, main: Tensor) -> Tensor:
    """x [n, in], weight [out, in] -> x weight^T [n, out]."""
    return x @ weight.t()


@linear.register_fake
def _(x: Tensor, weight: Tensor, main: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("llava_steps::linear_backward", mutates_args=())
def linear_backward(grad: Tensor, x: Tensor, weight: Tensor, main: Tensor) -> Tensor:
    """The gradient [n, in] of x; that of the weight is added to `main`, if it has elements."""
    if main.numel():
        add_product(main, grad, x)
    return grad @ weight


@linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, main: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1])


def _keep_linear(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, main = inputs
    ctx.trained = main.numel() > 0
    # The backward pass of a frozen weight does not need its input.
    ctx.save_for_backward(x if ctx.trained else main, weight, main)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    x, weight, main = ctx.saved_tensors
    return torch.ops.llava_steps.linear_backward(grad, x, weight, main), None, None


linear.register_autograd(_linear_backward, setup_context=_keep_linear)


@torch.library.custom_op("llava_steps::attention", mutates_args=())
def attention(
    mixed: Tensor, cos: Tensor, sin: Tensor, borders: Tensor, longest: Tensor, scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rotary embedding, then causal attention within each sample of a row.

    mixed, cos and sin as in `elementwise.rotary`; borders int32 [n+1]; longest int64 [], on the
    host, at least the longest sample; kernel as in flash.py -> (result [T, heads, d], log of the
    sum of exponentials [heads, T], rotated queries, rotated keys).
    """
    q, k = elementwise.rotary(mixed, cos, sin)
    v = mixed[:, :, -1]
    if flash.takes(q):
        out, lse = flash.attend(q, k, v, borders, int(longest), scale, kernel)
        return out, lse, q, k
    out = torch.cat([_dense(q[s], k[s], v[s], scale) for s in _samples(borders)])
    return out, q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32), q, k


@attention.register_fake
def _(
    mixed: Tensor, cos: Tensor, sin: Tensor, borders: Tensor, longest: Tensor, scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, groups, parts, width = mixed.shape
    heads = groups * (parts - 2)
    q, out = (mixed.new_empty(tokens, heads, width) for _ in range(2))
    lse = mixed.new_empty((heads, tokens), dtype=torch.float32)
    return out, lse, q, mixed.new_empty(tokens, groups, width)


@torch.library.custom_op("llava_steps::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, mixed: Tensor, cos: Tensor, sin: Tensor, borders: Tensor, longest: Tensor,
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, scale: float, kernel: str,
) -> Tensor:  # fmt: skip
    """The gradient of mixed."""
    v = mixed[:, :, -1]
    if flash.takes(q):
        dq, dk, dv = flash.attend_backward(
            grad, q, k, v, out, lse, borders, int(longest), scale, kernel
        )
    else:
        parts = [_dense_backward(grad[s], q[s], k[s], v[s], scale) for s in _samples(borders)]
        dq, dk, dv = (torch.cat(column) for column in zip(*parts, strict=True))
    return elementwise.rotary_backward(dq, dk, dv, cos, sin)


@attention_backward.register_fake
def _(
    grad: Tensor, mixed: Tensor, cos: Tensor, sin: Tensor, borders: Tensor, longest: Tensor,
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, scale: float, kernel: str,
) -> Tensor:  # fmt: skip
    return mixed.new_empty(mixed.shape)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(*tensors, *output)


def _attention_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    mixed = torch.ops.llava_steps.attention_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.kernel
    )
    return mixed, None, None, None, None, None, None


attention.register_autograd(_attention_backward, setup_context=_keep_attention)


@torch.library.custom_op("llava_steps::swiglu", mutates_args=())
def swiglu(x: Tensor) -> Tensor:
    """See `elementwise.swiglu`."""
    return elementwise.swiglu(x)


@swiglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.custom_op("llava_steps::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """See `elementwise.swiglu_backward`."""
    return elementwise.swiglu_backward(grad, x)


@swiglu_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep_swiglu(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, grad: Tensor) -> Tensor:
    result: Tensor = torch.ops.llava_steps.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)
    return result


swiglu.register_autograd(_swiglu_backward, setup_context=_keep_swiglu)


def _samples(borders: Tensor) -> list[slice]:
    ends = borders.tolist()
    return [slice(*pair) for pair in pairwise(ends)]


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out: Tensor = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


def _dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Written out, because autograd does not work inside an operation."""
    length, groups, shared = len(q), k.shape[1], q.shape[1] // k.shape[1]
    grad, q = (x.view(length, groups, shared, -1) for x in (grad, q))
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = torch.einsum("tgsd,ugd->gstu", q, k) * scale
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    dp = torch.einsum("tgsd,ugd->gstu", grad, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return (
        torch.einsum("gstu,ugd->tgsd", ds, k).flatten(1, 2),
        torch.einsum("gstu,tgsd->ugd", ds, q),
        torch.einsum("gstu,tgsd->ugd", p, grad),
    )


class Words(torch.autograd.Function):
    """Embeddings of a row with the features of its images in place.

    The gradient of the embedding goes to `main` only at the words of the row: the rest of the
    vocabulary, and the image tokens, whose embedding is not used, cost nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, trained: Tensor, weight: Tensor, main: Tensor, features: Tensor, tokens: Tensor,
        texts: Tensor, images: Tensor,
    ) -> Tensor:  # fmt: skip
        """weight [vocab, hidden], features [m, hidden], tokens int64 [T]; int64 positions
        of the words `texts` [T - m] and of the image tokens `images` [m] -> [T, hidden]. `trained`
        [0] wants a gradient if the weight is trained, and gets an empty one.
        """
        ctx.save_for_backward(tokens, texts, images)
        ctx.main, ctx.dtype = main, features.dtype
        out = F.embedding(tokens, weight)
        return out.index_copy_(0, images, features.to(out.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Nothing for the weight, whose gradient is in `main`."""
        tokens, texts, images = ctx.saved_tensors
        if ctx.main.numel():
            ctx.main.data.index_add_(0, tokens[texts], grad[texts].float())
        features = grad[images].to(ctx.dtype) if ctx.needs_input_grad[3] else None
        return grad.new_empty(0), None, None, features, None, None, None
