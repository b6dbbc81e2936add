"""The `te` layer spec: the decoder layers of specs.py with Transformer Engine's linears.

Their products can be FP8 (`TransformerConfig.fp8`); everything else in a layer stays in bf16: norms
and, as in compiled layers, one kernel each for rotary embedding with attention and for the gate.
Names and checkpoint are those of the `local` spec.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as extension
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from llava_steps.core.errors import ConfigError
from llava_steps.model.attention import Packed
from llava_steps.model.decoder import decoder_layer
from llava_steps.model.kernels import attention
from llava_steps.model.specs import Linears


def linears() -> Linears:
    """megatron-core's column- and row-parallel linears over those of Transformer Engine.

    ConfigError when Transformer Engine cannot be imported.
    """
    if not extension.HAVE_TE:
        raise ConfigError(
            "layer_spec te and fp8 need Transformer Engine, which cannot be imported here; install "
            "it (pip install --no-build-isolation 'transformer-engine[pytorch]'), or unset them"
        )
    return _fused(extension.TEColumnParallelLinear), _fused(extension.TERowParallelLinear)


def _fused(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """`linear`, whose product adds the gradient of its weight to `main_grad` in fp32.

    megatron-core's switch for this (gradient_accumulation_fusion) includes the head, which would
    then need an extension of Apex.
    """

    class Linear(linear):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.fuse_wgrad_accumulation = True

    Linear.__name__ = Linear.__qualname__ = linear.__name__
    return Linear


class TeLayer(TransformerLayer):  # type: ignore[misc]
    """megatron-core's layer, with its parameters and its checkpoint, and our own forward.

    The linears are called as modules, which communicate for tensor parallelism.
    """

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Packed, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [T (/tp), 1, hidden] -> the same; of the last layer chosen positions."""
        attend, mlp, packed = self.self_attention, self.mlp, packed_seq_params
        width, groups = self.config.kv_channels, attend.num_query_groups_per_partition
        cos, sin = packed.cos.flatten(1), packed.sin.flatten(1)
        rotary = cos, sin, packed.cu_seqlens, packed.longest
        out = decoder_layer(
            hidden_states.squeeze(1),
            (self.input_layernorm, self.pre_mlp_layernorm),
            (
                partial(_product, attend.linear_qkv),
                partial(_product, attend.linear_proj),
                partial(_product, mlp.linear_fc1),
                partial(_product, mlp.linear_fc2),
            ),
            None if attend.q_layernorm is None else (attend.q_layernorm, attend.k_layernorm),
            lambda mixed: attention(mixed, *rotary, width**-0.5, packed.kernel or "torch")[0],
            (groups, attend.num_attention_heads_per_partition // groups, width),
            packed.chosen_by(self),
        )
        return out.unsqueeze(1), None


def _product(linear: torch.nn.Module, x: Tensor) -> Tensor:
    """megatron-core's linears want [T, 1, in]."""
    out: Tensor
    out, bias = linear(x.unsqueeze(1))
    out = out.squeeze(1)
    return out if bias is None else out + bias
