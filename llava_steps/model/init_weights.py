"""Random initial weights, for trainings from scratch.

A tensor's values depend only on the seed and on its name, never on the layout: each rank draws
the whole tensor and keeps its part.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from llava_steps.conversion.lora import PREFIX
from llava_steps.model.weights import Chunks, sharded_weights


@torch.no_grad()
def draw_weights(chunks: Chunks, seed: int, deviation: float) -> None:
    """Fill the parameters: norms with 1, biases with 0, all else from N(0, deviation**2).

    LoRA adapters already have their initial values.

    An optimizer built before must reload them (`reload_model_params`).
    """
    state = sharded_weights(chunks)
    apply_factories(state)
    for shard in nested_values(state):
        if not shard.data.is_floating_point() or shard.key.startswith(PREFIX):
            continue
        axes = shard.prepend_axis_num  # the layer's number, in stacked tensors
        layer = tuple(shard.global_offset[:axes])
        whole = _drawn(f"{seed}:{shard.key}:{layer}", shard.key, shard.global_shape[axes:],
                       deviation)  # fmt: skip
        part = tuple(
            slice(start, start + size)
            for start, size in zip(shard.global_offset[axes:], shard.local_shape, strict=True)
        )
        shard.data.copy_(whole[part])


def _drawn(name: str, key: str, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
    """float32 of `shape`, on the CPU."""
    if key.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in key.rpartition(".")[0].rpartition(".")[2]:
        return torch.ones(shape)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    return torch.empty(shape).normal_(0.0, deviation, generator=torch.Generator().manual_seed(seed))
