"""Decoder layers, vision layers and the head as one compiled function each.

A layer's whole forward and backward pass becomes a few matrix products, flash attention, and one
kernel between two of these. Every layer is the same function of other weights, so it is compiled
once. Numbers of tokens, images and supervised positions are symbols in it, so no length makes it
compile again.

Only without tensor parallelism: the collectives of megatron-core's linears would break the function
into pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from llava_steps.geometry.geometry import Geometry
from llava_steps.model import fp8 as fp8_products
from llava_steps.model.attention import Packed
from llava_steps.model.decoder import decoder_layer
from llava_steps.model.kernels import Words, attention, linear
from llava_steps.model.vision import plain_layer

Function = Callable[..., Any]


def compile_function(function: Function) -> Function:
    """`function` compiled as a whole; what would break it up, or specialise it, is an error.

    Without CUDA the same graphs run operation by operation, which tests them without a compiler.
    """
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return torch.compile(function, fullgraph=True, backend=backend)


def main_grad(weight: Tensor) -> Tensor:
    """The buffer that accumulates the gradient of `weight`; empty when it needs none."""
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return weight.new_empty(0, dtype=torch.float32)
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    if buffer is None:
        raise RuntimeError(
            "compiled layers add gradients to main_grad: wrap the model in megatron-core's "
            "DistributedDataParallel before training it"
        )
    return buffer.data


class NotifyComplete(torch.autograd.Function):
    """The identity; its backward pass calls back for gradients that are complete by then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, complete: Sequence[Callable[[], None]]) -> Tensor:
        ctx.complete = complete
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        for callback in ctx.complete:
            callback()
        return grad, None


def notifying(x: Tensor, *weights: Tensor) -> Tensor:
    """x, as input of a function of x and `weights` that computes their gradients itself.

    After the backward pass of that function the `complete` callbacks of `weights` are called (see
    `training.optimizer.wrap`). Autograd does not know of these weights and would not call them.
    """
    complete = [w.complete for w in weights if w.requires_grad and hasattr(w, "complete")]
    if not (complete and torch.is_grad_enabled()):
        return x
    out: Tensor = NotifyComplete.apply(x, complete)  # type: ignore[no-untyped-call]
    return out


def symbolic(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, with a first size that is a symbol to the compiler."""
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)
    return tensors


def with_main_grad(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight, unknown to autograd, and its `main_grad`."""
    return weight.detach(), main_grad(weight)


def layer_function(geometry: Geometry, kernel: str, fp8: bool = False) -> Function:
    """The function of one decoder layer, not compiled, with the flash attention `kernel` and its
    four products in `fp8` or in the dtype of the weights.

    Takes hidden [T, hidden]; cos and sin [T, head_dim]; borders and longest as in
    `kernels.attention`; the four (weight, main_grad) pairs of qkv, proj, fc1 and fc2; the weights
    of both norms; biases of the four products and the weights of the query and key norms, or None;
    the chosen positions, or None. Returns [T, hidden], or that at the chosen positions.
    """
    g = geometry
    heads, eps, scale = (g.kv_heads, g.heads // g.kv_heads, g.head_dim), g.rms_eps, g.head_dim**-0.5
    multiply = fp8_products.linear if fp8 else linear

    def product(x: Tensor, weight: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        out: Tensor = multiply(x, *weight)
        return out if bias is None else out + bias

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def layer(
        hidden: Tensor, cos: Tensor, sin: Tensor, borders: Tensor, longest: Tensor,
        qkv: tuple[Tensor, Tensor], proj: tuple[Tensor, Tensor], fc1: tuple[Tensor, Tensor],
        fc2: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, ...], qk_norms: tuple[Tensor | None, ...],
        chosen: Tensor | None,
    ) -> Tensor:  # fmt: skip
        of_query, of_key = qk_norms
        return decoder_layer(
            hidden,
            (lambda x: norm(x, norms[0]), lambda x: norm(x, norms[1])),
            (
                lambda x: product(x, qkv, biases[0]),
                lambda x: product(x, proj, biases[1]),
                lambda x: product(x, fc1, biases[2]),
                lambda x: product(x, fc2, biases[3]),
            ),
            None
            if of_query is None or of_key is None
            else (lambda x: norm(x, of_query), lambda x: norm(x, of_key)),
            lambda mixed: attention(mixed, cos, sin, borders, longest, scale, kernel)[0],
            heads,
            chosen,
        )

    return layer


class CompiledLayer(TransformerLayer):  # type: ignore[misc]
    """megatron-core's layer, with its parameters and its checkpoint, and our own forward."""

    function: Function
    plain: Function
    """Set by `install`: the function of all layers of a model, and the same, not compiled."""

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Packed, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [T, 1, hidden] -> the same; of the last layer the chosen positions.

        The latter runs uncompiled: it would be one more function, for few positions of one layer.
        """
        attend, mlp, packed = self.self_attention, self.mlp, packed_seq_params
        linears = (attend.linear_qkv, attend.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        if any(x._forward_hooks or x._forward_pre_hooks for x in linears):
            raise RuntimeError(
                "compiled layers do not call hooks of their linears; set compile: none"
            )
        if any(x.weight.requires_grad for x in linears) and torch.is_grad_enabled():
            # Autograd knows of the weights only through what flows into the layer.
            assert hidden_states.requires_grad
        chosen = packed.chosen_by(self)
        function = self.function if chosen is None else self.plain
        out = function(
            *symbolic(
                notifying(hidden_states.squeeze(1), *(x.weight for x in linears)),
                packed.cos.flatten(1),
                packed.sin.flatten(1),
                packed.cu_seqlens,
            ),
            packed.longest,
            *(with_main_grad(x.weight) for x in linears),
            (self.input_layernorm.weight, self.pre_mlp_layernorm.weight),
            tuple(x.bias for x in linears),
            tuple(
                getattr(norm, "weight", None) for norm in (attend.q_layernorm, attend.k_layernorm)
            ),
            chosen,
        )
        return out.unsqueeze(1), None


def install(block: torch.nn.Module, geometry: Geometry, kernel: str, fp8: bool = False) -> None:
    """Give the `CompiledLayer`s of a block their function."""
    plain = layer_function(geometry, kernel, fp8)
    function = compile_function(plain)
    for layer in block.layers:  # type: ignore[union-attr]
        layer.function, layer.plain = function, plain


def embed(
    weight: Tensor, features: Tensor, tokens: Tensor, texts: Tensor, images: Tensor
) -> Tensor:
    """Embeddings [T, hidden] of a row with image features in place; see `kernels.Words`."""
    # In place of the weight: autograd must only know whether it is trained.
    trained = weight.new_empty(0).requires_grad_(weight.requires_grad)
    out: Tensor = Words.apply(  # type: ignore[no-untyped-call]
        notifying(trained, weight), *with_main_grad(weight), features, tokens, texts, images
    )
    return out


def head_losses(hidden: Tensor, weight: Tensor, main: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy fp32 [n] of hidden [n, hidden] at labels [n], weight [vocab, hidden].

    Keeps one copy of the logits in the compute dtype. Uses no scatter, whose deterministic form
    would need the logits twice more in fp32.
    """
    logits = linear(hidden, weight, main).float()
    ids = torch.arange(logits.shape[1], device=logits.device)
    wanted = torch.where(ids == labels[:, None], logits, 0.0).sum(1)
    return torch.logsumexp(logits, 1) - wanted


def losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`head_losses`, compiled, for any n above 1."""
    hidden, labels = symbolic(notifying(hidden, weight), labels)
    out: Tensor = _head()(hidden, *with_main_grad(weight), labels)
    return out


@cache
def _head() -> Function:
    return compile_function(head_losses)


def run_vision_layer(layer: Any, hidden: Tensor) -> Tensor:
    """A layer of the tower, compiled for any number of images; see `vision.plain_layer`."""
    out: Tensor = _vision_layer()(layer, *symbolic(hidden))
    return out


@cache
def _vision_layer() -> Function:
    return compile_function(plain_layer)
