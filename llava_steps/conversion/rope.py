"""Rotary position embedding with the formulas and the rounding of transformers.

The frequencies come from transformers' own ROPE_INIT_FUNCTIONS, so every rope type of `Geometry` is
exact. They are not module buffers, because `module.bfloat16()` must not round them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_steps.geometry.geometry import Geometry


def inverse_frequencies(geometry: Geometry) -> tuple[Tensor, float]:
    """fp32 frequencies [head_dim / 2] and the factor on cos and sin, for a Geometry's rope."""
    rope = geometry.rope
    if rope.kind == "default":
        exponents = torch.arange(0, geometry.head_dim, 2, dtype=torch.float) / geometry.head_dim
        return 1.0 / (rope.theta**exponents), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # An object with the attributes that the functions read; the keys are equal in all families.
    config = LlamaConfig(
        hidden_size=geometry.head_dim * geometry.heads,
        num_attention_heads=geometry.heads,
        head_dim=geometry.head_dim,
        max_position_embeddings=geometry.max_positions,
        rope_parameters=dict(rope.parameters),
    )
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope.kind](config, device=torch.device("cpu"))
    return frequencies.float(), float(scaling)


class RotaryTable:
    """cos and sin by position."""

    def __init__(self, geometry: Geometry) -> None:
        self._frequencies, self._scaling = inverse_frequencies(geometry)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions int64 [T] -> cos, sin [T, head_dim] in `dtype` (computed in fp32)."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        angles = positions[:, None].float() * self._frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (
            (angles.cos() * self._scaling).to(dtype),
            (angles.sin() * self._scaling).to(dtype),
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., head_dim] by cos and sin that broadcast against it (halves convention)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
