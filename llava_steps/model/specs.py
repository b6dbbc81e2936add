"""The `local` layer spec: a Llama-like decoder block from megatron-core parts and plain torch.

Needs neither Transformer Engine nor Apex nor CUDA. The spec `te` (te_spec.py) has other linears
under the same names; the checkpoint does not change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from llava_steps.geometry.geometry import Geometry
from llava_steps.model.attention import PackedAttention


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension; weight [hidden_size] in params_dtype.

    The weight is marked `sequence_parallel`, so that megatron-core sums its gradients over the
    tensor-parallel ranks, each of which normalises its own part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def add_bias_and_residual(training: bool, fused: bool) -> Any:
    """megatron-core's bias-dropout-add without dropout (a dropout of 0 still draws numbers)."""

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        if prob:
            raise ValueError("layer_spec local has no dropout; set hidden_dropout to 0")
        x, bias = x_with_bias
        return residual + (x if bias is None else x + bias)

    return add


def _with_bias(linear: type[torch.nn.Module], bias: bool) -> type[torch.nn.Module]:
    """`linear` with its own bias setting: megatron-core has one switch for all linears."""

    class Linear(linear):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": bias})

    Linear.__name__ = Linear.__qualname__ = linear.__name__
    return Linear


Linears = tuple[type[torch.nn.Module], type[torch.nn.Module]]
"""A column-parallel and a row-parallel linear."""
LOCAL: Linears = (ColumnParallelLinear, RowParallelLinear)


def layer_spec(
    geometry: Geometry,
    layer: type[TransformerLayer] = TransformerLayer,
    linears: Linears = LOCAL,
) -> ModuleSpec:
    """One decoder layer of `geometry`, of the class `layer`."""
    column, row = linears
    qk_norm = RMSNorm if geometry.qk_norm else None
    attention = SelfAttentionSubmodules(
        linear_qkv=_with_bias(column, geometry.qkv_bias),
        core_attention=_core_attention,
        linear_proj=_with_bias(row, geometry.output_bias),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    mlp = MLPSubmodules(
        linear_fc1=_with_bias(column, geometry.mlp_bias),
        linear_fc2=_with_bias(row, geometry.mlp_bias),
    )
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=add_bias_and_residual,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=add_bias_and_residual,
        ),
    )


def _core_attention(*, softmax_scale: float | None, **_: Any) -> PackedAttention:
    return PackedAttention(softmax_scale)


def block_spec(
    geometry: Geometry,
    layers: int,
    layer: type[TransformerLayer] = TransformerLayer,
    linears: Linears = LOCAL,
) -> TransformerBlockSubmodules:
    """`layers` decoder layers and the final norm (kept by the last pipeline stage only)."""
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(geometry, layer, linears)] * layers, layer_norm=RMSNorm
    )


def mark_tensor_parallel(module: torch.nn.Module) -> None:
    """Set the tensor-parallel attributes of every parallel weight.

    megatron-core sets them only while it initialises weights, which is skipped here. Without them
    the gradient norm counts such a weight on the first tensor-parallel rank only, silently.
    """
    for part in module.modules():
        mode = getattr(part, "parallel_mode", None)  # Transformer Engine's linears have it
        if mode == "column" or isinstance(part, (ColumnParallelLinear, VocabParallelEmbedding)):
            dim = 0
        elif mode == "row" or isinstance(part, RowParallelLinear):
            dim = 1
        else:
            continue
        if part.weight is not None and not hasattr(part.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(part.weight, True, dim, 1)
