"""The `te` layer spec: the decoder layers of specs.py with Transformer Engine's linears.

Their products can be FP8 (`TransformerConfig.fp8`); everything else in a layer stays as it is:
norms, rotary embedding, attention and gate in bf16. Names and checkpoint are those of the `local`
spec.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions import transformer_engine as extension

from llava_steps.core.errors import ConfigError
from llava_steps.model.specs import Linears


def linears() -> Linears:
    """megatron-core's column- and row-parallel linears over those of Transformer Engine.

    ConfigError when Transformer Engine cannot be imported.
    """
    if not extension.HAVE_TE:
        raise ConfigError(
            "layer_spec te and fp8 need Transformer Engine, which cannot be imported here; install "
            "it (pip install --no-build-isolation 'transformer-engine[pytorch]'), or leave them out"
        )
    return _fused(extension.TEColumnParallelLinear), _fused(extension.TERowParallelLinear)


def _fused(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """`linear`, whose product adds the gradient of its weight to `main_grad` in fp32.

    megatron-core's switch for this (gradient_accumulation_fusion) would be for the head too, which
    needs an extension of Apex then.
    """

    class Linear(linear):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.fuse_wgrad_accumulation = True

    Linear.__name__ = Linear.__qualname__ = linear.__name__
    return Linear
